"""Deadlines, with the real model and a watch that counts tokens in the place of seconds."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from grating_core import Reranker
from grating_core.engine.walk import Walk
from grating_core.engine.watch import Watch
from grating_core.requests import Request
from tests.core.conftest import BUNDLED
from tests.core.parity import load
from tests.core.policies import StandsStill

QUERY = "How many people live in Berlin?"
DOCUMENTS = [
    "Bread needs yeast, and time.", "Museums of Berlin are many.", "Cats sleep most of the day.",
    "Berlin had a population of 3,520,031 registered inhabitants in 2015.", "The population of Paris, in 2014.",
    "Rivers of Germany are the Rhine, the Elbe and others.", "Chess openings for beginners.", "Rain in Spain.",
    "Berlin has 3.7 million people.", "How many people live there, nobody knows.",
]  # fmt: skip
SLICE = 40


class Clock:
    """Its time is the number of tokens that have gone through a layer."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time


@pytest.fixture(scope="module", params=["auto", "off"])
def reranker(request: pytest.FixtureRequest) -> Iterator[Reranker]:
    with Reranker.from_pretrained(BUNDLED, pruning=request.param, dtype="float32", device="cpu") as reranker:
        reranker.scorer.slice_tokens = SLICE
        yield reranker


@pytest.fixture
def clock(reranker: Reranker, monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock, step = Clock(), Walk.step

    def counted(walk: Walk, part: object, *args: object) -> object:
        clock.time += part.tokens.stop - part.tokens.start
        return step(walk, part, *args)

    monkeypatch.setattr(Walk, "step", counted)
    monkeypatch.setattr(reranker.scorer, "watch", Watch(reranker.scorer.model.depth, clock.now))
    return clock


@pytest.mark.parametrize("scores", ["exact", "estimated"])
@pytest.mark.parametrize("top_k", [3, 20])
def test_with_enough_time_every_bit_is_as_without_a_deadline(reranker: Reranker, scores: str, top_k: int) -> None:
    free = reranker.rerank(QUERY, DOCUMENTS, top_k, scores=scores)
    for _ in range(2):  # without experience, and with it
        timed = reranker.rerank(QUERY, DOCUMENTS, top_k, scores=scores, deadline=1000)
        assert timed.ranking == free.ranking
        assert not timed.trace.cut_short
        assert [layer.alive for layer in timed.trace.layers if layer.layer] == [
            layer.alive for layer in free.trace.layers if layer.layer
        ]


def test_a_deadline_is_met_but_for_one_slice_and_the_ranking_is_whole(reranker: Reranker, clock: Clock) -> None:
    free = reranker.rerank(QUERY, DOCUMENTS, 3)
    full = reranker.score([(QUERY, document) for document in DOCUMENTS])
    whole = sum(free.trace.lengths) * free.trace.depth
    cut, spent = 0, list[float]()
    for share in (0.001, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.2, 2.5):
        began = clock.time
        result = reranker.rerank(QUERY, DOCUMENTS, 3, deadline=share * whole)
        assert clock.time - began < share * whole + SLICE
        if result.trace.cut_short and share >= 0.2:
            spent.append((clock.time - began) / (share * whole))
        assert len({ranked.index for ranked in result.ranking}) == 3
        cut += result.trace.cut_short
        if not result.trace.cut_short:
            assert result.ranking == free.ranking
        for ranked in result.ranking:
            if not ranked.estimated:
                assert ranked.score == pytest.approx(full[ranked.index], abs=1e-4)
        for before, after in zip(result.trace.layers, result.trace.layers[1:], strict=False):
            assert set(after.alive) <= set(before.alive)
    assert 5 < cut < 13
    assert sum(spent) / len(spent) > 0.8


def test_without_any_time_the_order_is_the_callers(reranker: Reranker) -> None:
    result = reranker.rerank(QUERY, DOCUMENTS, 3, deadline=1e-6)
    assert [(ranked.index, ranked.score, ranked.estimated) for ranked in result.ranking] == [
        (0, 0.0, True), (1, 0.0, True), (2, 0.0, True)
    ]  # fmt: skip
    trace = result.trace
    assert (trace.cut_short, trace.layers, trace.compute_share) == (True, (), 0.0)
    assert (trace.summary()["candidates"], trace.summary()["cut_short"]) == (len(DOCUMENTS), True)
    assert reranker.rerank(QUERY, [], 3, deadline=1e-6).ranking == []


def test_without_a_lens_the_first_are_computed_to_the_end(reranker: Reranker, clock: Clock) -> None:
    if reranker.lens is not None:
        pytest.skip("there is a lens")
    full = reranker.score([(QUERY, document) for document in DOCUMENTS])
    result = reranker.rerank(QUERY, DOCUMENTS, 10, deadline=0.5 * clock.time)
    exact = [ranked for ranked in result.ranking if not ranked.estimated]
    others = result.ranking[len(exact) :]
    assert 2 < len(exact) < 8
    assert {ranked.index for ranked in exact} == set(range(len(exact)))
    assert [ranked.index for ranked in exact] == sorted(range(len(exact)), key=lambda i: -full[i])
    assert [ranked.index for ranked in others] == list(range(len(exact), 10))
    assert {ranked.score for ranked in others} == {exact[-1].score}


def test_each_request_of_a_pass_has_its_own_deadline(reranker: Reranker, clock: Clock) -> None:
    free = reranker.rerank(QUERY, DOCUMENTS, 3)
    whole = sum(free.trace.lengths) * free.trace.depth
    deadlines = (None, 100 * whole, 0.2 * whole, None)
    results = reranker.rerank_many([Request(QUERY, DOCUMENTS, 3, deadline=one) for one in deadlines])
    for deadline, result in zip(deadlines, results, strict=True):
        assert result.trace.cut_short == (deadline == 0.2 * whole)
        if not result.trace.cut_short:
            assert [(ranked.index, ranked.score) for ranked in result.ranking] == [
                (ranked.index, pytest.approx(ranked.score, abs=1e-4)) for ranked in free.ranking
            ]


async def test_who_waits_for_a_pass_beyond_the_deadline_gets_the_callers_order(tiny_bert: Path) -> None:
    policy = StandsStill()
    reranker = load(tiny_bert, pruning=policy)
    try:
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(reranker.rerank, "w1", ["w2", "w3", "w4"], 1)
            assert policy.reached.wait(30)
            waited = [
                reranker.rerank("w1", ["w2", "w3", "w4"], 2, deadline=0.02),
                await reranker.arerank("w1", ["w2", "w3", "w4"], 2, deadline=0.02),
            ]
            assert not first.done()
            for result in waited:
                assert [ranked.index for ranked in result.ranking] == [0, 1]
                assert result.trace.cut_short
            policy.go.set()
            assert len(first.result(30).ranking) == 1
        assert not reranker.rerank("w1", ["w2", "w3"], 1, deadline=100).trace.cut_short
    finally:
        policy.go.set()


@pytest.mark.parametrize("deadline", [0, -1.0, float("nan"), float("inf"), True, "1", [1.0]])
async def test_a_deadline_that_is_no_time_is_refused_by_name(tiny_bert: Path, deadline: object) -> None:
    reranker = load(tiny_bert)
    with pytest.raises(ValueError, match=r"^deadline="):
        reranker.rerank("w1", ["w2"], deadline=deadline)
    with pytest.raises(ValueError, match=r"^deadline="):
        await reranker.arerank("w1", ["w2"], deadline=deadline)
    with pytest.raises(ValueError, match=r"^requests\[0\]: deadline="):
        reranker.rerank_many([Request("w1", ["w2"], deadline=deadline)])
