"""The loop, with the real model and with policies that hypothesis makes up."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from grating_core import ClusterPolicy, Reranker, Route
from grating_core.engine import head
from grating_core.engine.ragged import filled
from grating_core.errors import ScoreError
from grating_core.layers import layer as plain_steps
from grating_core.layers import packed_steps
from grating_core.pruning import MarginPolicy, Off
from tests.core.conftest import WORDS, save_model
from tests.core.parity import load, random_text

QUERY = "w1 w2"
SOURCE = random.Random(7)
DOCUMENTS = [random_text(length, SOURCE, WORDS) for length in (4, 30, 1, 12, 60, 7, 7, 25)]


@dataclass
class Scripted:
    """Routes drawn from hypothesis within the contract; remembers what it was asked."""

    draw: st.DrawFn
    asked: list[tuple[int, int, int]] = field(default_factory=list)

    def route(self, layer: int, scores: np.ndarray, top_k: int) -> Sequence[Route]:
        assert 1 <= top_k < len(scores)
        self.asked.append((layer, len(scores), top_k))
        selected = self.draw(st.integers(0, top_k))
        dropped = self.draw(st.integers(0, len(scores) - top_k))
        routes = [Route.SELECTED] * selected + [Route.DROPPED] * dropped
        routes += [Route.DEFERRED] * (len(scores) - len(routes))
        return self.draw(st.permutations(routes))


@dataclass
class Fixed:
    """The same routes after one layer, and nothing after the others."""

    after: int
    routes: list[Route]

    def route(self, layer: int, scores: np.ndarray, top_k: int) -> Sequence[Route]:
        return self.routes if layer == self.after else [Route.DEFERRED] * len(scores)


@pytest.fixture(scope="module")
def full(tiny_bert: Path) -> dict[int, float]:
    """The unpruned score of every document."""
    return dict(enumerate(load(tiny_bert).score([(QUERY, document) for document in DOCUMENTS])))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), top_k=st.integers(1, 12), count=st.integers(1, len(DOCUMENTS)), exact=st.booleans())
def test_any_policy_gives_k_distinct_winners(
    tiny_bert: Path, full: dict[int, float], data: st.DataObject, top_k: int, count: int, exact: bool
) -> None:
    policy = Scripted(data.draw)
    scores = "exact" if exact else "estimated"
    result = load(tiny_bert, pruning=policy).rerank(QUERY, DOCUMENTS[:count], top_k, scores=scores)
    winners = [ranked.index for ranked in result.ranking]
    assert len(winners) == len(set(winners)) == min(top_k, count)
    assert [ranked.text for ranked in result.ranking] == [DOCUMENTS[i] for i in winners]
    for ranked in result.ranking:
        if not ranked.estimated:
            assert ranked.score == pytest.approx(full[ranked.index], abs=1e-5)
    if exact:
        assert not any(ranked.estimated for ranked in result.ranking)
        assert len(result.trace.layers) == result.trace.depth
        assert [r.score for r in result.ranking] == sorted((r.score for r in result.ranking), reverse=True)
    layers = result.trace.layers
    for before, after in pairwise(layers):
        gone = {Route.DROPPED} if exact else {Route.DROPPED, Route.SELECTED}
        routed = zip(before.alive, before.routes, strict=True)
        assert after.alive == tuple(i for i, route in routed if route not in gone)
    for layer in layers:
        assert layer.tokens == sum(result.trace.lengths[i] for i in layer.alive)
        assert len(layer.alive) == len(layer.routes) == len(layer.scores)


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(len(DOCUMENTS))), top_k=st.integers(1, len(DOCUMENTS)))
def test_off_equals_sorting_all_scores(
    tiny_bert: Path, full: dict[int, float], order: list[int], top_k: int
) -> None:
    result = load(tiny_bert, pruning=Off()).rerank(QUERY, [DOCUMENTS[i] for i in order], top_k)
    assert [order[r.index] for r in result.ranking] == sorted(full, key=lambda i: -full[i])[:top_k]
    assert result.trace.compute_share == 1.0


def test_cluster_pruning_on_the_real_model(bundled: Reranker) -> None:
    """Dropping saves compute, and what is returned has the full model's scores."""
    topics = ["Berlin has 3.7 million inhabitants.", "Museums of Berlin.", "Bread needs yeast.", "Cats sleep.",
              "The population of Paris.", "Rivers of Germany.", "Chess openings.", "Rain in Spain."]  # fmt: skip
    query = "How many people live in Berlin?"
    expected = dict(enumerate(bundled.score([(query, text) for text in topics])))
    for scores in ("exact", "estimated"):
        reranker = load(bundled.model_path, pruning=ClusterPolicy(0.5))
        result = reranker.rerank(query, topics, 2, scores=scores)
        assert result.trace.compute_share < 0.95
        assert result.ranking[0].index == 0
        if scores == "exact":
            assert {r.index: r.score for r in result.ranking} == pytest.approx(
                {r.index: expected[r.index] for r in result.ranking}, abs=1e-4
            )


def test_a_layer_where_nothing_can_be_decided_is_not_looked_at(tiny_bert: Path, full: dict[int, float]) -> None:
    depth = load(tiny_bert).scorer.model.depth
    never = (float("inf"),) * depth
    unseen = MarginPolicy(never, never)
    once = MarginPolicy((*never[:1], 0.0, *never[2:]), never)
    assert [unseen.looks(1), once.looks(0), once.looks(1)] == [False, False, True]
    result = load(tiny_bert, pruning=unseen).rerank(QUERY, DOCUMENTS, 3)
    assert [ranked.index for ranked in result.ranking] == sorted(full, key=lambda i: -full[i])[:3]
    assert [bool(layer.scores) for layer in result.trace.layers] == [False] * (depth - 1) + [True]
    assert result.trace.compute_share == 1.0
    result = load(tiny_bert, pruning=once).rerank(QUERY, DOCUMENTS, 3)
    assert [len(layer.alive) for layer in result.trace.layers] == [len(DOCUMENTS)] + [3] * (depth - 1)
    assert [bool(layer.scores) for layer in result.trace.layers] == [True] + [False] * (depth - 2) + [True]


S, D, L = Route.SELECTED, Route.DEFERRED, Route.DROPPED


@pytest.mark.parametrize(
    ("routes", "ended", "estimated"),
    [
        ([S, S, S, L, L, L, L, L], 2, 3),  # every place taken
        ([S, D, D, L, L, L, L, L], 2, 3),  # as many deferred as places left: the published termination
        ([S, S, S, D, D, D, D, D], 2, 3),  # no place left for the deferred
        ([S, D, D, D, L, L, L, L], 5, 1),  # one too many: goes on
        ([D, D, D, L, L, L, L, L], 2, 3),
    ],
)
def test_estimated_scores_end_the_forward_when_all_is_decided(
    tiny_bert: Path, routes: list[Route], ended: int, estimated: int
) -> None:
    result = load(tiny_bert, pruning=Fixed(2, routes)).rerank(QUERY, DOCUMENTS, 3, scores="estimated")
    assert len(result.trace.layers) == ended
    assert [ranked.estimated for ranked in result.ranking] == [True] * estimated + [False] * (3 - estimated)
    provisional = dict(enumerate(result.trace.layers[1].scores))
    assert all(r.score == provisional[r.index] for r in result.ranking if r.estimated)
    assert {i for i, route in enumerate(routes) if route is S} <= {ranked.index for ranked in result.ranking}


@pytest.mark.parametrize("routes", [[L] * 6 + [D] * 2, [S] * 4 + [D] * 4, [D] * 7, [D] * 9])
@pytest.mark.parametrize("scores", ["exact", "estimated"])
def test_a_policy_that_breaks_its_contract_is_told_so(tiny_bert: Path, routes: list[Route], scores: str) -> None:
    reranker = load(tiny_bert, pruning=Fixed(2, routes))
    with pytest.raises(ValueError, match="after layer 2"):
        reranker.rerank(QUERY, DOCUMENTS, 3, scores=scores)
    assert len(reranker.rerank(QUERY, DOCUMENTS[:3], 3).ranking) == 3


@pytest.mark.parametrize("word", ["dropped", "selected", "maybe"])
def test_routes_that_are_plain_words_do_not_slip_past_the_contract(tiny_bert: Path, word: str) -> None:
    class Words:
        def route(self, layer: int, scores: np.ndarray, top_k: int) -> list[str]:
            return [word] * len(scores)

    with pytest.raises(ValueError, match="after layer 1"):
        load(tiny_bert, pruning=Words()).rerank("w1", ["w2", "w3", "w4"], 2, scores="estimated")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_names_its_document(tmp_path: Path, value: float) -> None:
    directory = save_model(tmp_path, "bert")
    path = directory / "model.safetensors"
    weights = load_file(path)
    weights["bert.embeddings.word_embeddings.weight"][4 + WORDS.index("w150")] = value
    save_file(weights, path, {"format": "pt"})
    reranker = load(directory, pruning="cluster")
    with pytest.raises(ScoreError, match="document 2 "):
        reranker.rerank("w1", ["w2", "w3 w4", "w5 w150", "w6"], 2)
    with pytest.raises(ScoreError, match="document 300 "):
        reranker.score([("w1", "w2")] * 300 + [("w1", "w150")])
    assert len(reranker.rerank("w1", ["w2", "w3 w4"], 2).ranking) == 2


def test_the_last_layer_computes_scoring_positions_only(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reranker = load(tiny)
    spec = reranker.scorer.model.spec
    with reranker.scorer.model.layer(1) as first:
        computed = filled if first.fills else int
    rows = []

    for steps in (plain_steps, packed_steps):

        def counted(*args: Any, finished: Any = steps.finished) -> Tensor:
            rows.append(len(args[2]))
            return finished(*args)

        monkeypatch.setattr(steps, "finished", counted)
    trace = reranker.rerank(QUERY, DOCUMENTS).trace
    all_tokens = computed(sum(trace.lengths) - (len(DOCUMENTS) - 1) * trace.shared_prefix)
    assert rows[:-1] == [all_tokens] * (spec.depth - 1)
    assert rows[-1] == (all_tokens if spec.pooling == "mean" else computed(len(DOCUMENTS)))


@pytest.mark.parametrize("slice_tokens", [None, 40, 1])
def test_a_gpu_reads_means_of_all_sequences_together(
    slice_tokens: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = save_model(tmp_path, "modernbert-mean")
    pairs = [(QUERY, document) for document in DOCUMENTS]
    expected = load(directory).score(pairs)
    monkeypatch.setattr(head, "is_together", lambda device: True)
    assert load(directory, slice_tokens=slice_tokens).score(pairs) == pytest.approx(expected, abs=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_equals_cpu(tiny: Path) -> None:
    pairs = [(QUERY, document) for document in DOCUMENTS]
    assert load(tiny, device="cuda").score(pairs) == pytest.approx(load(tiny).score(pairs), abs=1e-4)
