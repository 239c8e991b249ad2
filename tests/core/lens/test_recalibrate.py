"""Staying calibrated: the rule, what is kept of it, the thread, and the whole on real models."""

import gc
import math
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from grating_core import ClusterPolicy, Reranker
from grating_core.engine.scorer import Scorer
from grating_core.forking import Interrupted
from grating_core.lens import recalibrate as recalibration
from grating_core.lens.pruning import plan_pruning, scaled
from grating_core.lens.recalibrate import Logged, Recalibration
from grating_core.lens.state import BOUNDS, Sampling, State, state_path
from grating_core.pruning import MarginPolicy, Margins, Off
from tests.core.conftest import WORDS
from tests.core.memory.conftest import load_planned
from tests.core.parity import load, random_text

SAMPLING = Sampling(share=1.0, target=0.98, guarantee="share")
REQUEST = Logged("w1 w2", [" ".join(f"w{(7 * n + m) % 200}" for m in range(10 + n)) for n in range(12)], (0, 1))


def until(true: Callable[[], bool]) -> None:
    """Wait for another thread; how long does not matter."""
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.002)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "grating-recalibration"]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nobody waits for a second; nothing is left behind."""
    monkeypatch.setattr(recalibration, "IDLE", 0.0)
    yield
    if threads():
        gc.collect()
    until(lambda: not threads())


class Model:
    """Stands for the reranker: gives falling scores, or what it is told to."""

    def __init__(self) -> None:
        self.asked: list[Logged] = []
        self.go_on = threading.Event()
        self.go_on.set()
        self.answer: Callable[[Logged], Sequence[float]] = lambda request: [-float(n) for n in range(12)]

    def rerun(self, request: Logged, pause: Callable[[], bool]) -> Sequence[float]:
        self.asked.append(request)
        while not self.go_on.wait(0.001):
            if pause():
                raise Interrupted
        return self.answer(request)


@pytest.fixture
def model() -> Model:
    return Model()


def watched(model: Model, path: Path, sampling: Sampling = SAMPLING) -> Recalibration[Model]:
    return Recalibration(model, Model.rerun, sampling, path / "state.json")


def request(*found: int, query: str = "q") -> Logged:
    return Logged(query, ["d"] * 12, found)


# The rule


@pytest.mark.parametrize("start", [BOUNDS[0], 1.0, BOUNDS[1]])
@pytest.mark.parametrize("target", [0.9, 0.98])
def test_the_mean_loss_comes_to_what_the_target_allows(start: float, target: float) -> None:
    source = random.Random(3)
    state, losses = State(factor=start), []
    for number in range(6000):
        difficulty = source.expovariate(2.0) * (2.0 if number > 2000 else 1.0)  # other requests from there on
        lost = 0.4 if difficulty > state.factor else 0.0
        losses.append(lost)
        state = state.after(1 - lost, target)
    assert np.mean(losses[-3000:]) == pytest.approx(1 - target, abs=0.2 * (1 - target))
    assert BOUNDS[0] < state.factor < BOUNDS[1]
    assert state.requests == 6000
    assert len(state.recent) == 50


def test_the_factor_moves_as_documented_and_within_bounds() -> None:
    assert State().after(0.0, 0.98).factor == pytest.approx(math.exp(0.2 * 0.98))
    assert State().after(1.0, 0.98).factor == pytest.approx(math.exp(-0.2 * 0.02))
    low = high = State()
    for _ in range(2000):
        low, high = low.after(1.0, 0.98), high.after(0.0, 0.98)
    assert (low.factor, high.factor) == BOUNDS
    assert (low.agreement, high.agreement, State().agreement) == (1.0, 0.0, None)


def test_what_was_kept_of_the_full_models_best() -> None:
    scores = [5.0, 1.0, 4.0, 4.0, 3.0]
    assert Logged("q", "abcde", (0, 2)).kept(scores) == 1
    assert Logged("q", "abcde", (3, 0)).kept(scores) == 1  # which of two equals
    assert Logged("q", "abc", (0,)).kept([4.0, 4.00001, 1.0]) == 1
    assert Logged("q", "abc", (0,)).kept([4.0, 4.001, 1.0]) == 0
    assert Logged("q", "abcde", (0, 4)).kept(scores) == 0.5
    assert Logged("q", "abcde", (1,)).kept(scores) == 0


def test_the_factor_multiplies_threshold_or_margins() -> None:
    assert scaled(ClusterPolicy(0.5, 3), 4.0) == ClusterPolicy(2.0, 3)
    assert scaled(MarginPolicy((1.0, math.inf), (2.0, 0.0)), 0.5) == MarginPolicy((0.5, math.inf), (1.0, 0.0))
    assert scaled(Off(), 4.0) == Off()


# What is kept on disk


def test_what_was_learnt_survives_a_restart(model: Model, tmp_path: Path) -> None:
    first = watched(model, tmp_path)
    first.sample(request(5, 6, query="a secret"))
    until(lambda: (tmp_path / "state.json").exists())
    first.close()
    again = watched(model, tmp_path)
    assert (again.factor, again.requests, again.agreement) == (first.factor, 1, 0.0)
    assert again.factor > 1
    assert "secret" not in (tmp_path / "state.json").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


@pytest.mark.parametrize(
    "damaged",
    [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"format": 1}',
     b'{"format": 2, "factor": 1, "requests": 0, "recent": []}',
     b'{"format": 1, "factor": NaN, "requests": 0, "recent": []}',
     b'{"format": 1, "factor": 1, "requests": Infinity, "recent": []}',
     b'{"format": 1, "factor": 99, "requests": 0, "recent": []}',
     b'{"format": 1, "factor": 1, "requests": 1, "recent": [7]}'],
)  # fmt: skip
def test_a_damaged_state_is_left_with_a_warning(
    model: Model, tmp_path: Path, damaged: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "state.json").write_bytes(damaged)
    found = watched(model, tmp_path)
    assert (found.factor, found.requests, found.agreement) == (1.0, 0, None)
    assert "starts anew" in caplog.text
    assert "state.json" in caplog.text


def test_what_was_learnt_is_for_one_pruning_and_one_goal() -> None:
    cells, looks = np.ones((1, 2), dtype=np.int64), np.ones((1, 2), dtype=bool)
    margins = Margins(np.ones(2), np.ones(2), np.ones(1), cells, np.ones((2, 2, 1, 1)), looks)
    other = replace(margins, drop=np.zeros(2))
    goals = [SAMPLING, Sampling(1.0, 0.9, "share"), Sampling(1.0, 0.98, "set")]
    prunings = [ClusterPolicy(), ClusterPolicy(0.1), ClusterPolicy(clusters=3), margins, other]
    paths = {state_path(name, pruning, goal) for name in "ab" for pruning in prunings for goal in goals}
    assert len(paths) == 2 * 5 * 3
    assert state_path("a", margins, SAMPLING) == state_path("a", margins, Sampling(0.1, 0.98, "share"))


# The thread


def test_a_caller_interrupts_and_the_request_is_computed_again_afterwards(model: Model, tmp_path: Path) -> None:
    model.go_on.clear()
    learning = watched(model, tmp_path)
    learning.sample(request(0, 1))
    until(lambda: len(model.asked) == 1)
    with learning.caller():
        until(lambda: learning.waiting == 1)  # given up and put back
        model.go_on.set()
        with learning.caller():
            pass
        assert len(model.asked) == 1  # the first caller still waits
        assert learning.requests == 0
    until(lambda: learning.requests == 1)
    assert model.asked[1] is model.asked[0]
    learning.close()


def test_it_waits_until_nobody_has_called_for_a_while(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recalibration, "IDLE", 1000.0)
    learning = watched(model, tmp_path)
    learning.sample(request(0))
    until(lambda: bool(threads()))
    time.sleep(0.05)
    assert not model.asked
    learning.close()
    assert not threads()


def test_of_too_many_requests_the_oldest_are_forgotten(model: Model, tmp_path: Path) -> None:
    learning = watched(model, tmp_path)
    with learning.caller():
        for number in range(100):
            learning.sample(request(0, query=str(number)))
    until(lambda: learning.requests == 32)
    assert [asked.query for asked in model.asked] == [str(number) for number in range(68, 100)]
    learning.close()


def test_the_share_is_sampled(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recalibration, "MOST_WAITING", 10_000)
    learning = watched(model, tmp_path, Sampling(0.1, 0.98, "share"))
    before = random.getstate()
    with learning.caller():
        for _ in range(5000):
            learning.sample(request(0))
        assert 350 < learning.waiting < 650
    assert random.getstate() == before
    learning.close()


def test_an_error_is_logged_and_the_next_request_computed(
    model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fine = model.answer

    def answer(asked: Logged) -> Sequence[float]:
        if asked.query == "bad":
            raise OSError("the weights are gone")
        return fine(asked)

    model.answer = answer
    learning = watched(model, tmp_path)
    learning.sample(request(0, query="bad"))
    learning.sample(request(0))
    until(lambda: learning.requests == 1)
    assert "the weights are gone" in caplog.text
    learning.close()


def test_with_sets_a_request_is_kept_or_not(model: Model, tmp_path: Path) -> None:
    learning = watched(model, tmp_path, Sampling(1.0, 0.9, "set"))
    learning.sample(request(0, 1, 2, 7))
    until(lambda: learning.requests == 1)
    assert learning.agreement == 0
    learning.close()


def test_a_drop_is_told_once_with_numbers(model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    learning = watched(model, tmp_path, Sampling(1.0, 0.9, "share"))

    def told(found: int, times: int) -> int:
        """Warnings after so many more requests; 0 was the best, 5 was not."""
        for _ in range(times):
            done = learning.requests
            learning.sample(request(found))
            until(lambda done=done: learning.requests > done)
        return len(caplog.records)

    assert told(5, 19) == 0  # too few to tell
    assert told(5, 1) == 1
    assert "agreement 0.000 over the last 20 requests" in caplog.text
    assert "target 0.9" in caplog.text
    assert told(5, 60) == 1
    assert told(0, 60) == 1
    assert told(5, 10) == 2  # it had recovered
    learning.close()


def test_closing_ends_the_thread_in_the_middle_of_a_request(model: Model, tmp_path: Path) -> None:
    model.go_on.clear()
    learning = watched(model, tmp_path)
    learning.sample(request(0))
    until(lambda: len(model.asked) == 1)
    learning.close()
    assert not threads()
    learning.sample(request(0))
    learning.close()
    assert not threads()


def test_the_thread_ends_with_its_owner(tmp_path: Path) -> None:
    model = Model()
    learning = watched(model, tmp_path)
    learning.sample(request(0))
    until(lambda: learning.requests == 1)
    del model
    gc.collect()
    until(lambda: not threads())


# On models


def test_a_forward_can_be_given_up_after_any_slice(tiny_bert: Path, spill_directory: Path) -> None:
    everything = {"resident": (), "hidden_tokens": 0, "embedding_rows": 7}
    with load_planned(tiny_bert, **everything) as planned, load(tiny_bert, slice_tokens=64) as resident:
        for reranker in (planned, resident):
            expected = reranker.score([(REQUEST.query, text) for text in REQUEST.documents])
            slices = 0
            answered = False
            while not answered:
                asked = 0

                def pause() -> bool:
                    nonlocal asked
                    asked += 1
                    return asked > slices  # noqa: B023

                try:
                    found = reranker.scorer.full_scores(REQUEST, pause)
                    answered = True
                except Interrupted:
                    slices += 1
                assert reranker.rerank(REQUEST.query, REQUEST.documents[:3]).ranking
            assert found == pytest.approx(expected, abs=1e-5)
            assert slices > 2 * 5  # several in each layer
        assert not list(spill_directory.iterdir())


def test_a_caller_takes_the_turn_of_a_budget(tiny_bert: Path, spill_directory: Path) -> None:
    planned = load_planned(tiny_bert, resident=(), hidden_tokens=0)
    expected = planned.rerank(REQUEST.query, REQUEST.documents, 3).ranking
    computing = threading.Event()

    def rerun(scorer: Scorer, logged: Logged, pause: Callable[[], bool]) -> Sequence[float]:
        def in_a_slice() -> bool:
            if scorer.turn.locked() and not computing.is_set():
                computing.set()
                until(pause)
            return pause()

        return scorer.full_scores(logged, in_a_slice)

    planned.recalibration = Recalibration(planned.scorer, rerun, SAMPLING, spill_directory / "state.json")
    planned.recalibration.sample(REQUEST)
    assert computing.wait(30)
    assert planned.recalibration.requests == 0
    assert planned.rerank(REQUEST.query, REQUEST.documents, 3).ranking == expected
    until(lambda: planned.recalibration.requests >= 1)
    planned.close()


def test_off_by_default(tiny_bert: Path) -> None:
    reranker = load(tiny_bert, pruning="auto")
    reranker.rerank(REQUEST.query, REQUEST.documents, 3)
    assert reranker.recalibration is None
    assert not threads()


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan, True, "0.1"])
def test_a_share_that_is_none(tiny_bert: Path, share: object) -> None:
    with pytest.raises(ValueError, match="recalibrate="):
        load(tiny_bert, pruning="auto", recalibrate=share)


@pytest.mark.parametrize(
    ("pruning", "told"),
    [("off", "has neither"), (Off(), "has neither"), (ClusterPolicy(0.0), "above 0"),
     (ClusterPolicy(math.inf), "finite")],
)  # fmt: skip
def test_pruning_with_nothing_to_move(tiny_bert: Path, pruning: object, told: str) -> None:
    with pytest.raises(ValueError, match=rf"recalibrate=0\.1 .*{told}"):
        load(tiny_bert, pruning=pruning, recalibrate=0.1)
    load(tiny_bert, pruning=pruning, recalibrate=0)


@pytest.mark.parametrize("end", ["close", "forget"])
def test_the_thread_ends_with_the_reranker(tiny_bert: Path, spill_directory: Path, end: str) -> None:
    reranker = Reranker.shared(tiny_bert, device="cpu", dtype="float32", pruning="cluster", recalibrate=1)
    assert not threads()
    for _ in range(3):
        reranker.rerank(REQUEST.query, REQUEST.documents, 3)
    assert len(threads()) == 1
    if end == "close":
        reranker.close()
        assert not threads()
    held = weakref.ref(reranker)
    del reranker
    until(lambda: gc.collect() >= 0 and held() is None)
    until(lambda: not threads())


def test_requests_that_nothing_can_be_dropped_from_say_nothing(tiny_bert: Path, spill_directory: Path) -> None:
    with load(tiny_bert, pruning="auto", recalibrate=1) as reranker:
        reranker.rerank(REQUEST.query, REQUEST.documents, 12)
        reranker.rerank(REQUEST.query, [], 3)
        reranker.score([("w1", "w2")])
        assert not threads()


def is_pruned_by(factor: float, reranker: Reranker, query: str, documents: list[str], top_k: int = 3) -> bool:
    """Whether a rerank drops what it should when margins or thresholds are multiplied."""
    pruning = plan_pruning(reranker.pruning, len(documents), top_k, exact=True, factor=factor)
    layers = reranker.rerank(query, documents, top_k).trace.layers[:-1]
    asked = [layer for layer in layers if len(layer.alive) > top_k and layer.scores]
    routes = [list(pruning.policy.route(layer.layer, np.array(layer.scores), top_k)) for layer in asked]
    return bool(asked) and routes == [list(layer.routes) for layer in asked]


@pytest.mark.usefixtures("without_8_bits")
def test_with_a_lens_the_margins_move(tiny_bert: Path, spill_directory: Path) -> None:
    source = random.Random(5)
    texts, queries = ([random_text(length, source, WORDS) for _ in range(60)] for length in (20, 4))
    with load(tiny_bert, pruning="auto", target=0.6, recalibrate=1.0) as reranker:
        reranker.rerank(queries[0], texts[:10], 3)
        assert reranker.recalibration is None  # there is no lens yet, and so nothing to move
        reranker.calibrate(texts, queries, candidates=10, top_k=3, requests=40)
        assert not threads()
        assert reranker.recalibration.factor == 1
        assert is_pruned_by(1.0, reranker, queries[0], texts[:10])
        until(lambda: reranker.recalibration.requests == 1)
        factor = reranker.recalibration.factor
        assert factor != 1
    with load(tiny_bert, pruning="auto", target=0.6, recalibrate=1e-9) as again:
        assert again.recalibration.factor == factor
        assert is_pruned_by(factor, again, queries[0], texts[:10])
        path = state_path(again.identity, again.lens.margins, Sampling(1e-9, 0.6, "share"))
    shares = []
    for bound in BOUNDS:
        State(bound).save(path)
        with load(tiny_bert, pruning="auto", target=0.6, recalibrate=1e-9) as extreme:
            assert is_pruned_by(bound, extreme, queries[0], texts[:10])
            shares.append(extreme.rerank(queries[0], texts[:10], 3).trace.compute_share)
    assert shares[0] < shares[1]


def test_careless_pruning_becomes_more_careful(bundled: Reranker, spill_directory: Path) -> None:
    known = (
        "has many museums",
        "lies on a river",
        "is the capital",
        "is known for its food",
        "was damaged in the war",
    )
    documents = [f"{city} {what}." for city in ("Berlin", "Paris", "Rome", "Oslo") for what in known]
    # Early layers have no idea.
    queries = ["Which town is old?", "What can one see in Europe?", "Which town is small?", "Where is it cold?"]
    settings = {"pruning": ClusterPolicy(0.1, 2), "recalibrate": 1.0}
    with load(bundled.model_path, **settings) as reranker:
        learning = reranker.recalibration
        for number, query in enumerate(queries):
            reranker.rerank(query, documents, 3)
            until(lambda number=number: learning.requests == number + 1)
        assert learning.agreement < 0.95
        assert learning.factor > 1.03
    with load(bundled.model_path, **settings) as again:
        assert (again.recalibration.factor, again.recalibration.requests) == (learning.factor, len(queries))
        assert is_pruned_by(learning.factor, again, queries[0], documents)
