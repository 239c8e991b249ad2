"""Who goes into which pass, in whose thread, and whom an error, a cancellation, a fork or closing concerns."""

import asyncio
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from time import monotonic, sleep

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grating_core.engine.job import Job
from grating_core.engine.lanes import Lanes
from grating_core.engine.passes import Passes
from grating_core.forking import Interrupted, Lock, Threads
from grating_core.text.pairs import TokenisedPair
from tests.core.forking import in_fork

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


def until(true: Callable[[], object], seconds: float = 30.0) -> None:
    end = monotonic() + seconds
    while not true():
        assert monotonic() < end
        sleep(0.001)


class Asked(Job[str]):
    """A job that is found out by its name."""

    def __init__(self, name: str, tokens: int = 1, error: BaseException | None = None) -> None:
        self.name, self.error = name, error
        super().__init__(lambda: [[TokenisedPair([0] * tokens, [0] * tokens)]])


class Engine:
    """Answers each job with its name, and writes down what went through together, in which thread."""

    def __init__(self, most_tokens: int = 3, lanes: Lanes | None = None) -> None:
        self.passes_of: list[list[str]] = []
        self.threads: list[str] = []
        self.go, self.reached = threading.Event(), threading.Event()
        self.go.set()
        self.turn, self.thread = Lock(), Threads(1, "grating-test")
        self.passes: Passes[str] = Passes(self.run, self.turn, self.thread, most_tokens, lanes)

    def run(self, jobs: Sequence[Asked]) -> None:
        assert self.turn.locked()
        self.passes_of.append([job.name for job in jobs])
        self.threads.append(threading.current_thread().name)
        self.reached.set()
        assert self.go.wait(30)
        for job in jobs:
            if job.error is not None:
                raise job.error
        for job in jobs:
            job.finish(job.name.upper())

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Somebody computes, and all others come meanwhile."""
        self.go.clear()
        self.reached.clear()
        with ThreadPoolExecutor(1) as first:
            answer = first.submit(self.passes.compute, [Asked("first")])
            assert self.reached.wait(30)
            try:
                yield
            finally:
                self.go.set()
            assert answer.result(30) == ["FIRST"]

    def come(self, pool: ThreadPoolExecutor, jobs: Sequence[Asked]) -> Future[list[str]]:
        """A caller comes in a thread of its own, and waits before the next one comes."""
        before = self.passes.waiting
        answer = pool.submit(self.passes.compute, jobs)
        until(lambda: self.passes.waiting > before)
        return answer


def test_who_is_alone_computes_in_its_own_thread() -> None:
    engine = Engine()
    assert engine.passes.compute([Asked("a"), Asked("b", 2), Asked("c", 2), Asked("d", 9)]) == list("ABCD")
    assert engine.passes_of == [["a", "b"], ["c"], ["d"]]
    assert set(engine.threads) == {threading.current_thread().name}
    assert engine.passes.compute([]) == []
    assert not engine.turn.locked()


def test_who_comes_meanwhile_goes_into_the_next_pass_first_come_first_served() -> None:
    engine = Engine()
    with ThreadPoolExecutor(9) as pool:
        with engine.busy():
            sizes = {"a": 1, "b": 1, "c": 2, "d": 9, "e": 1}
            answers = [engine.come(pool, [Asked(name, tokens)]) for name, tokens in sizes.items()]
        assert [answer.result(30) for answer in answers] == [[name.upper()] for name in sizes]
    # Nobody overtakes: what does not fit begins the next pass, and what never fits has one for itself.
    assert engine.passes_of[1:] == [["a", "b"], ["c"], ["d"], ["e"]]
    assert all(name.startswith("grating-test") for name in engine.threads[1:])


def test_callers_with_several_jobs_take_turns() -> None:
    engine = Engine()
    with ThreadPoolExecutor(9) as pool:
        with engine.busy():
            many = engine.come(pool, [Asked(f"a{number}") for number in range(5)])
            one = engine.come(pool, [Asked("b")])
            two = engine.come(pool, [Asked("c0"), Asked("c1")])
        assert many.result(30) == [f"A{number}" for number in range(5)]
        assert (one.result(30), two.result(30)) == (["B"], ["C0", "C1"])
    assert engine.passes_of[1:] == [["a0", "b", "c0"], ["a1", "c1", "a2"], ["a3", "a4"]]


def test_who_computes_many_lets_others_in_after_a_pass() -> None:
    engine = Engine(1)
    engine.go.clear()
    with ThreadPoolExecutor(2) as pool:
        many = pool.submit(engine.passes.compute, [Asked(f"a{number}") for number in range(4)])
        assert engine.reached.wait(30)
        one = engine.come(pool, [Asked("b")])
        engine.go.set()
        assert one.result(30) == ["B"]
        assert many.result(30) == ["A0", "A1", "A2", "A3"]
    assert [name for (name,) in engine.passes_of] == ["a0", "b", "a1", "a2", "a3"]


@settings(deadline=None, max_examples=40)
@given(
    callers=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=6),
    most=st.integers(1, 8),
)
@pytest.mark.parametrize("lanes", [False, True])
def test_any_callers_get_their_own_answers_once(callers: list[list[int]], most: int, lanes: bool) -> None:
    engine = Engine(most, Lanes() if lanes else None)
    sizes: dict[str, int] = {}
    asked = []
    for caller, tokens in enumerate(callers):
        names = [f"{caller}-{number}" for number in range(len(tokens))]
        sizes.update(zip(names, tokens, strict=True))
        asked.append(names)
    with ThreadPoolExecutor(len(callers)) as pool:
        answers = list(
            pool.map(lambda names: engine.passes.compute([Asked(name, sizes[name]) for name in names]), asked)
        )
    assert answers == asked  # digits have no upper case
    assert sorted(chain(*engine.passes_of)) == sorted(sizes)
    for names in engine.passes_of:
        assert len(names) == 1 or sum(sizes[name] for name in names) <= most
    for names in asked if not lanes else ():
        done = [name for name in chain(*engine.passes_of) if name in names]
        assert done == names


# Errors


@pytest.mark.parametrize("error", [ValueError("bad"), SystemExit(3), MemoryError()], ids=repr)
def test_an_error_reaches_only_the_caller_that_caused_it(error: BaseException) -> None:
    engine = Engine()
    with ThreadPoolExecutor(9) as pool:
        with engine.busy():
            good = engine.come(pool, [Asked("a")])
            bad = engine.come(pool, [Asked("b", error=error)])
            late = engine.come(pool, [Asked("c")])
        assert good.result(30) == ["A"]
        assert late.result(30) == ["C"]
        assert bad.exception(30) is error
    assert not engine.turn.locked()
    assert engine.passes.compute([Asked("d")]) == ["D"]


def test_texts_that_cannot_be_encoded_fail_only_their_caller() -> None:
    engine = Engine()
    broken = Asked("a")
    Job.__init__(broken, lambda: [][0])
    with ThreadPoolExecutor(9) as pool:
        with engine.busy():
            bad, good = engine.come(pool, [broken]), engine.come(pool, [Asked("b")])
        assert good.result(30) == ["B"]
        assert isinstance(bad.exception(30), IndexError)
    assert ["b"] in engine.passes_of


def test_the_first_error_of_many_ends_the_rest() -> None:
    engine = Engine(1)
    jobs = [Asked("a"), Asked("b", error=ValueError("bad")), Asked("c")]
    with pytest.raises(ValueError, match="bad"):
        engine.passes.compute(jobs)
    assert engine.passes_of == [["a"], ["b"]]
    assert jobs[2].given_up()


def test_a_caller_that_is_interrupted_leaves_the_others_alone() -> None:
    """Ctrl-C comes to the main thread, whatever it computes."""
    engine = Engine()
    interrupted = Asked("a", error=KeyboardInterrupt())
    engine.go.clear()
    with ThreadPoolExecutor(9) as pool:
        mine = pool.submit(engine.passes.compute, [interrupted, Asked("b"), Asked("c", 2)])
        assert engine.reached.wait(30)
        other = engine.come(pool, [Asked("d")])
        engine.go.set()
        assert other.result(30) == ["D"]
        assert isinstance(mine.exception(30), KeyboardInterrupt)
    assert engine.passes_of == [["a", "b"], ["d"]]
    assert not engine.turn.locked()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), GeneratorExit()])
def test_a_job_that_interrupts_its_pass_ends_nobody_elses(error: BaseException) -> None:
    engine = Engine()
    with ThreadPoolExecutor(9) as pool:
        with engine.busy():
            answers = [engine.come(pool, [Asked("a")]), engine.come(pool, [Asked("b", error=error)])]
        assert answers[0].result(30) == ["A"]
        assert answers[1].exception(30) is error
    assert engine.passes_of == [["first"], ["a", "b"], ["a"], ["b"]]
    assert engine.passes.compute([Asked("c")]) == ["C"]


def test_a_caller_that_is_interrupted_while_it_waits_is_forgotten() -> None:
    class Interrupting(Asked):
        """The caller is interrupted when it begins to wait for the answer."""

        class Waiting(Future):  # type: ignore[type-arg]
            def result(self, timeout: float | None = None) -> str:
                raise KeyboardInterrupt

        def __init__(self, name: str) -> None:
            super().__init__(name)
            self.future = self.Waiting()

    engine = Engine()
    with ThreadPoolExecutor(9) as pool:
        with engine.busy():
            gone = engine.come(pool, [Interrupting("a")])
            assert isinstance(gone.exception(30), KeyboardInterrupt)
            other = engine.come(pool, [Asked("b")])
        assert other.result(30) == ["B"]
    assert engine.passes_of == [["first"], ["b"]]


def test_a_job_that_the_engine_leaves_was_given_up() -> None:
    passes: Passes[str] = Passes(lambda jobs: None, Lock(), Threads(1, "grating-test"), 3)
    with pytest.raises(Interrupted):
        passes.compute([Asked("a")])


def test_without_a_thread_only_who_would_wait_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()

    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(sleep, [0.05] * 3))  # its own threads are there
        engine.go.clear()
        first = pool.submit(engine.passes.compute, [Asked("first")])
        assert engine.reached.wait(30)
        with monkeypatch.context() as broken:
            broken.setattr(threading.Thread, "start", fail)
            with pytest.raises(RuntimeError, match="can't start new thread"):
                engine.passes.compute([Asked("a")])
        second = engine.come(pool, [Asked("b")])
        engine.go.set()
        assert (first.result(30), second.result(30)) == (["FIRST"], ["B"])


# Tasks


async def test_thousands_of_tasks_wait_without_threads() -> None:
    engine, blocked = Engine(50), threading.Event()
    before = threading.active_count()
    with ThreadPoolExecutor(1) as one:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(one)
        held = loop.run_in_executor(None, blocked.wait, 30)
        engine.go.clear()
        jobs = [Asked(f"job {number}") for number in range(3000)]
        tasks = [asyncio.create_task(engine.passes.awaited(job)) for job in jobs]
        while not engine.reached.is_set():
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        assert threading.active_count() <= before + 2  # the executor's, and the one that computes
        for task in tasks[1000:2000]:
            task.cancel()
        await asyncio.wait(tasks[1000:2000])
        engine.go.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        blocked.set()
        await held
    expected = [*range(1000), *range(2000, 3000)]
    assert [answers[number] for number in expected] == [f"JOB {number}" for number in expected]
    assert all(isinstance(answer, asyncio.CancelledError) for answer in answers[1000:2000])
    assert list(chain(*engine.passes_of)) == [f"job {number}" for number in expected]  # first come, first served
    assert not any("encoded" in vars(job) for job in jobs)


async def test_a_cancelled_task_gives_its_job_up() -> None:
    engine = Engine()
    engine.go.clear()
    job, other = Asked("a"), Asked("b")
    task = asyncio.create_task(engine.passes.awaited(job))
    while not engine.reached.is_set():
        await asyncio.sleep(0.001)
    beside = asyncio.create_task(engine.passes.awaited(other))
    await asyncio.sleep(0)
    assert not job.given_up()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert job.given_up()
    assert not other.given_up()
    engine.go.set()
    assert await beside == "B"
    with pytest.raises(CancelledError):
        job.future.result()


# Forks and closing


@forks
def test_a_forked_child_has_its_own_passes() -> None:
    engine = Engine()
    with ThreadPoolExecutor(9) as pool:
        with engine.busy():
            waiting = [engine.come(pool, [Asked(name)]) for name in "ab"]

            def work() -> list[str]:
                engine.go.set()
                with ThreadPoolExecutor(4) as own:
                    found = list(own.map(lambda name: engine.passes.compute([Asked(name)]), "cdef"))
                engine.passes.close()
                return [name for (name,) in found]

            assert in_fork(work) == list("CDEF")
        assert [answer.result(30) for answer in waiting] == [["A"], ["B"]]


def test_closing_waits_for_those_who_wait_and_refuses_others() -> None:
    engine = Engine(1)
    with ThreadPoolExecutor(9) as pool:
        with engine.busy():
            waiting = [engine.come(pool, [Asked(name), Asked(name)]) for name in "ab"]
            closing = pool.submit(engine.passes.close)
            sleep(0.02)
            assert not closing.done()
            with pytest.raises(RuntimeError, match="closed"):
                engine.passes.compute([Asked("c")])
        closing.result(30)
        assert [answer.result(30) for answer in waiting] == [["A", "A"], ["B", "B"]]
    engine.passes.close()
    with pytest.raises(RuntimeError, match="closed"):
        asyncio.run(engine.passes.awaited(Asked("c")))


def test_a_job_ends_once() -> None:
    job = Asked("a", 3)
    assert (job.tokens, job.over, job.given_up()) == (3, False, False)
    job.finish("A")
    job.fail(ValueError())
    job.finish("B")
    assert (job.future.result(), job.tokens, job.over, job.given_up()) == ("A", 3, True, False)
    paused = Job[str](lambda: [], pause=lambda: True)
    assert paused.given_up()
    assert not paused.over
    job = Asked("b")
    job.future.cancel()
    job.finish("B")
    job.fail(ValueError())
    assert job.given_up()
    assert job.over
