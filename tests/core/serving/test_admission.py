"""The queue that is bounded by tokens."""

from contextlib import suppress

import pytest

from grating_core.serving.admission import Queue
from grating_core.serving.errors import Refused


def test_places_hold_their_tokens_until_they_are_left() -> None:
    queue = Queue(100)
    with queue.place() as one, queue.place() as other:
        one.take(60)
        other.take(40)
        assert (queue.tokens, queue.requests) == (100, 2)
        one.take(10)  # what was estimated has been counted
        assert queue.tokens == 50
    assert (queue.tokens, queue.requests) == (0, 0)


def test_a_full_queue_says_when_to_come_again() -> None:
    queue = Queue(100)
    with queue.place() as one, queue.place() as other:
        one.take(61)
        with pytest.raises(Refused) as refused:
            other.take(40)
        assert refused.value.status == 429
        assert 1 <= int(refused.value.headers["Retry-After"]) <= 60
        assert "61 tokens" in refused.value.message
        assert queue.tokens == 61


def test_a_place_is_left_by_an_error_as_well() -> None:
    queue = Queue(100)
    with suppress(KeyError), queue.place() as place:
        place.take(90)
        raise KeyError
    assert (queue.tokens, queue.requests) == (0, 0)


def test_a_request_larger_than_the_queue_comes_in_when_it_is_empty() -> None:
    queue = Queue(100)
    with queue.place() as place:
        place.take(500)
        with queue.place() as other, pytest.raises(Refused):
            other.take(1)


def test_the_speed_is_learnt_from_what_was_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("grating_core.serving.admission.monotonic", lambda: now)
    queue = Queue(100_000)
    assert queue.seconds(10_000) == 1  # nothing is known yet
    for _ in range(3):
        with queue.place() as place:
            place.take(1000)
            now += 2.0
        now += 100.0  # nobody was there
    assert queue.seconds(10_000) == 20
    assert queue.seconds(1_000_000) == 60
    assert queue.seconds(1) == 1
