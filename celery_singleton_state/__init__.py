"""Celery tasks that run once at a time and remember where they were."""

from .decorator import singleton_task
from .errors import (
    HeartbeatFailed,
    KeyValueStoreError,
    LeaderHandoffFailed,
    SchemaDecodeFailed,
    SingletonError,
    SingletonErrorReason,
    StateLoadFailed,
    StatePersistFailed,
)
from .kv import KeyValueStore
from .retry import RetryPolicy
from .schedules import matches_now, next_runs
from .task import SingletonTask

__version__ = "0.1.0"

__all__ = [
    "HeartbeatFailed",
    "KeyValueStore",
    "KeyValueStoreError",
    "LeaderHandoffFailed",
    "RetryPolicy",
    "SchemaDecodeFailed",
    "SingletonError",
    "SingletonErrorReason",
    "SingletonTask",
    "StateLoadFailed",
    "StatePersistFailed",
    "__version__",
    "matches_now",
    "next_runs",
    "singleton_task",
]
