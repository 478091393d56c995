"""Mark the errors that happen while a connection to a store is being made.

Some drivers raise one class of error for two reasons: a connection cannot be made, or the database
refuses a value. The mark says that the reason is the connection.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from celery.exceptions import ImproperlyConfigured

from celery_singleton_state.errors import FROM_OUTSIDE

from .base import StoreError, StoreMisconfigured

_MARK = "raised_while_connecting"
_PASSED_ON = (*FROM_OUTSIDE, StoreError, ImproperlyConfigured)


@contextmanager
def connecting(setting: str, *driver_errors: type[Exception]) -> Iterator[None]:
    """Run a block that makes a connection, and mark the driver's errors that it raises.

    :func:`was_connecting` reads the mark.

    :param setting: the name of the setting that has the URL.
    :param driver_errors: the driver's own classes of errors.
    :raises StoreMisconfigured: the block raised an error of another class. For faults of networks
        and servers drivers raise their own classes. So the reason is a value in the URL, or a file
        that the URL names.
    """
    try:
        yield
    except driver_errors as error:
        vars(error)[_MARK] = True
        raise
    except _PASSED_ON:
        raise
    except Exception as error:
        raise StoreMisconfigured(
            f"{setting}: no connection can be made with this URL, because {_why(error)}"
        ) from error


def was_connecting(error: BaseException) -> bool:
    """Return whether an error was raised while a connection was being made."""
    error = getattr(error, "orig", None) or error
    return bool(getattr(error, _MARK, False))


def _why(error: Exception) -> str:
    """Return the reason for an error, without parts of the URL or contents of a file, because both
    can contain passwords.
    """
    if isinstance(error, UnicodeError):
        return "the name of the host, the user or the password cannot be encoded"
    if isinstance(error, OSError) and error.strerror:
        name = f" ({error.filename})" if error.filename else ""
        return f"{type(error).__name__}: {error.strerror}{name}"
    return f"a value in it is not allowed ({type(error).__name__})"
