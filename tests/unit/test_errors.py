import json
import pickle

import pytest

from celery_singleton_state import SingletonError, SingletonErrorReason
from celery_singleton_state.errors import is_retryable

RETRYABLE = {"StateLoadFailed", "StatePersistFailed"}


@pytest.mark.parametrize("reason", SingletonErrorReason)
def test_each_reason_has_an_error_class_of_the_same_name(reason: SingletonErrorReason) -> None:
    error = SingletonError.from_reason(reason.value, "shop.import", "gone")
    assert type(error).__name__ == reason.value
    assert (error.reason, error.singleton, error.detail) == (reason, "shop.import", "gone")
    assert error.retryable is is_retryable(reason) is (reason in RETRYABLE)
    assert str(error) == "shop.import: gone"


def test_an_error_without_a_detail_shows_the_singleton_only() -> None:
    assert str(SingletonError.from_reason("HeartbeatFailed", "shop.import")) == "shop.import"


def test_an_unknown_reason_is_refused_with_all_known_reasons() -> None:
    with pytest.raises(ValueError, match="unknown reason 'Tired'") as caught:
        SingletonError.from_reason("Tired", "shop.import", "")
    assert all(reason in str(caught.value) for reason in SingletonErrorReason)


@pytest.mark.parametrize("reason", SingletonErrorReason)
def test_errors_are_rebuilt_from_their_args(reason: SingletonErrorReason) -> None:
    error = SingletonError.from_reason(reason, "shop.import", "gone")
    unpickled = pickle.loads(pickle.dumps(error))
    from_json = type(error)(*json.loads(json.dumps(error.args)))
    for copy in (unpickled, from_json):
        assert type(copy) is type(error)
        assert copy.args == error.args
