"""What goes wrong while a connection is made: it never is of a value that is to be stored."""

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
    """Mark the driver's own errors of the block, which makes a connection.

    :param setting: the name of the setting with the URL.
    :raises StoreMisconfigured: for errors that are not the driver's. They come of a value in the
        URL, or of a file that it names: drivers have their own errors for networks and servers.
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
    """Whether an error was raised while a connection was made."""
    error = getattr(error, "orig", None) or error
    return bool(getattr(error, _MARK, False))


def _why(error: Exception) -> str:
    """A reason that shows nothing of the URL or of a file."""
    if isinstance(error, UnicodeError):
        return "the name of the host, the user or the password cannot be encoded"
    if isinstance(error, OSError) and error.strerror:
        name = f" ({error.filename})" if error.filename else ""
        return f"{type(error).__name__}: {error.strerror}{name}"
    return f"a value in it is not allowed ({type(error).__name__})"
