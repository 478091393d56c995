"""Celery tasks that run once at a time and remember where they were."""

from . import signals
from .config.retry import RetryPolicy
from .config.task_options import TaskOptions
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
from .health import Health, SingletonHealth, check_health
from .kv import KeyValueStore
from .schedules.due import matches_now, next_runs
from .task import SingletonTask

__version__ = "0.1.0"

__all__ = [
    "Health",
    "HeartbeatFailed",
    "KeyValueStore",
    "KeyValueStoreError",
    "LeaderHandoffFailed",
    "RetryPolicy",
    "SchemaDecodeFailed",
    "SingletonError",
    "SingletonErrorReason",
    "SingletonHealth",
    "SingletonTask",
    "StateLoadFailed",
    "StatePersistFailed",
    "TaskOptions",
    "__version__",
    "check_health",
    "matches_now",
    "next_runs",
    "signals",
    "singleton_task",
]
