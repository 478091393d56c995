"""Find the run that the calling code is in, through the code's context variables."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .run import Run

#: The innermost run that the calling code is in; ``None`` outside of runs.
CURRENT: ContextVar[Run | None] = ContextVar("celery_singleton_state_run", default=None)
#: The runs of this process. A forked child has its parent's runs here as well; ``Run.is_here`` is
#: false for these.
ACTIVE: set[Run] = set()


def current_run(task: Any) -> Run | None:
    """Return the run of this task that the calling code is in; ``None`` if it is in no run."""
    if CURRENT.get() is None:
        return None
    run = _innermost(task)
    return None if run is None or run.is_over else run


def why_no_run(task: Any) -> str:
    """Explain why the calling code is in no run of this task, for an error's text.

    :returns: why a run cannot be found. The text is empty if the task does not run in this process
        at all, because then the error needs no further explanation.
    """
    if _innermost(task) is not None:
        return "this code has the context of a run that has ended"
    if not any(run.task is task and run.is_here for run in tuple(ACTIVE)):
        return ""
    return (
        "its body runs in another thread or greenlet of this process; to use the run there, start "
        "the function in the run's context, for example by "
        "executor.submit(contextvars.copy_context().run, function)"
    )


def _innermost(task: Any) -> Run | None:
    run = CURRENT.get()
    while run is not None and run.task is not task:
        run = run.outer
    return run
