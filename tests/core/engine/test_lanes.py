"""Two passes at a time: who gets which jobs, and what an error, closing or a fork does to both."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import pytest
import torch

from grating_core.engine.lanes import Lanes
from tests.core.engine.test_passes import Asked, Engine, forks, until
from tests.core.forking import in_fork

pytestmark = pytest.mark.usefixtures("two_threads")


class Meeting(Engine):
    """Each pass with a job whose name begins with "m" goes on when there is another one beside it."""

    def __init__(self, most_tokens: int = 9) -> None:
        super().__init__(most_tokens, Lanes())
        self.meeting = threading.Barrier(2)
        self.lanes: list[threading.Thread] = []
        self.numbers: list[int] = []

    def run(self, jobs: Sequence[Asked]) -> None:
        self.numbers.append(torch.get_num_threads())
        if any(job.name.startswith("m") for job in jobs):
            self.lanes.append(threading.current_thread())
            self.meeting.wait(30)
        super().run(jobs)


def test_two_passes_run_at_once_with_half_of_the_threads_each() -> None:
    engine = Meeting()
    torch.set_num_threads(6)
    assert engine.passes.compute([Asked(f"m{number}") for number in range(2)]) == ["M0", "M1"]
    assert sorted(engine.passes_of) == [["m0"], ["m1"]]
    assert engine.numbers == [3, 3]
    assert torch.get_num_threads() == 6
    with ThreadPoolExecutor(1) as later:  # a new thread has all of them, too
        assert later.submit(torch.get_num_threads).result() == 6


def test_a_single_job_has_all_threads() -> None:
    engine = Meeting()
    assert engine.passes.compute([Asked("a")]) == ["A"]
    with ThreadPoolExecutor(1) as pool:
        with engine.busy():
            waiting = engine.come(pool, [Asked("b")])
        assert waiting.result(30) == ["B"]
    assert engine.numbers == [2, 2, 2]
    assert engine.threads[0] == threading.current_thread().name
    assert engine.threads[2].startswith("grating-test")


def test_one_thread_has_one_lane() -> None:
    engine = Engine(9, Lanes())
    torch.set_num_threads(1)
    assert engine.passes.compute([Asked(name) for name in "abcd"]) == list("ABCD")
    assert engine.passes_of == [["a", "b"], ["c"], ["d"]]
    assert len(set(engine.threads)) == 1


def test_callers_with_several_jobs_take_turns_in_both_lanes() -> None:
    engine = Meeting()
    with ThreadPoolExecutor(9) as pool:
        with engine.busy():
            many = engine.come(pool, [Asked(f"m{number}") for number in range(6)])
            one = engine.come(pool, [Asked("m-b")])
            two = engine.come(pool, [Asked("m-c")])
        assert many.result(30) == [f"M{number}" for number in range(6)]
        assert (one.result(30), two.result(30)) == (["M-B"], ["M-C"])
    first, *rest = engine.passes_of[1:]
    assert {len(names) for names in (first, rest[0])} == {4, 2}  # half of eight, and half of the rest
    assert {"m-b", "m-c"} < {*first, *rest[0]}
    assert sorted(chain(first, *rest)) == sorted([*(f"m{number}" for number in range(6)), "m-b", "m-c"])


@pytest.mark.parametrize("error", [ValueError("bad"), MemoryError(), SystemExit(3)], ids=repr)
def test_an_error_in_one_pass_does_not_touch_the_other(error: BaseException) -> None:
    engine = Meeting()
    with ThreadPoolExecutor(9) as pool:
        with engine.busy():
            bad = engine.come(pool, [Asked("m-bad", error=error)])
            good = engine.come(pool, [Asked("m-good")])
        assert good.result(30) == ["M-GOOD"]
        assert bad.exception(30) is error
    until(lambda: not engine.turn.locked())
    assert engine.passes.compute([Asked("m1"), Asked("m2")]) == ["M1", "M2"]


def test_closing_waits_for_both_lanes() -> None:
    engine = Meeting()
    with ThreadPoolExecutor(9) as pool:
        with engine.busy():
            waiting = [engine.come(pool, [Asked(name)]) for name in ("m1", "m2")]
            closing = pool.submit(engine.passes.close)
        closing.result(30)
        assert [answer.result(1) for answer in waiting] == [["M1"], ["M2"]]
    with pytest.raises(RuntimeError, match="closed"):
        engine.passes.compute([Asked("c"), Asked("d")])
    until(lambda: not any(thread.is_alive() for thread in engine.lanes))


def test_a_lane_that_calls_its_own_passes_is_told_so() -> None:
    engine = Meeting()

    class Asks(Asked):
        def finish(self, found: str) -> None:
            engine.passes.compute([Asked("x")])

    bad, good = Asks("m1"), Asked("m2")
    with pytest.raises(RuntimeError, match="that waits for its routes"):
        engine.passes.compute([bad, good])


def test_without_more_threads_the_leading_one_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(9, Lanes())
    with ThreadPoolExecutor(1) as pool, engine.busy():
        engine.come(pool, [Asked("a")])  # the leading thread is there
    started = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name.startswith("grating-lane"):
            raise RuntimeError("can't start new thread")
        started(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    assert engine.passes.compute([Asked("b"), Asked("c")]) == ["B", "C"]
    assert all(name.startswith("grating-test") for name in engine.threads[-2:])


@forks
def test_a_forked_child_has_its_own_lanes() -> None:
    engine = Meeting()
    assert engine.passes.compute([Asked("m1"), Asked("m2")]) == ["M1", "M2"]
    assert in_fork(lambda: engine.passes.compute([Asked("m3"), Asked("m4")])) == ["M3", "M4"]
    assert engine.passes.compute([Asked("m5"), Asked("m6")]) == ["M5", "M6"]
