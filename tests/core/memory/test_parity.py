"""Whatever is streamed, spilled or cached: the scores are those of the model that is all in memory."""

import random
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch

from grating_core import ClusterPolicy
from grating_core.pruning import Route
from grating_core.results import RerankResult
from tests.core.conftest import WINDOW, WORDS, save_model
from tests.core.memory.conftest import PLANS, load_planned
from tests.core.parity import TOLERANCE, padded_scores, random_text

QUERY = "w1 w2"


def texts(seed: int, count: int = 12) -> list[str]:
    """Uneven lengths, among them none at all and more than the window."""
    source = random.Random(seed)
    lengths = [0, 1, 2 * WINDOW, *(source.randint(1, WINDOW) for _ in range(count - 3))]
    return [random_text(length, source, WORDS) for length in lengths]


class DropHalf:
    """Drops the worse half of what it may after every layer, so that candidates leave from the middle."""

    def route(self, layer, scores, top_k):
        order = scores.argsort()
        routes = [Route.DEFERRED] * len(scores)
        for index in order[: (len(scores) - top_k + 1) // 2]:
            routes[index] = Route.DROPPED
        return routes


POLICIES = {"half": DropHalf(), "cluster": ClusterPolicy(0.1)}


# What several tests compare with is computed once.


@cache
def padded(directory: Path, seed: int) -> list[float]:
    return padded_scores(directory, [(QUERY, text) for text in texts(seed)])


@cache
def whole_scores(directory: Path, seed: int) -> list[float]:
    return load_planned(directory).score([(QUERY, text) for text in texts(seed)])


@cache
def whole_result(directory: Path, policy: str, seed: int, scores: str) -> RerankResult:
    return load_planned(directory, pruning=POLICIES[policy]).rerank(QUERY, texts(seed, 20), 3, scores=scores)


@pytest.mark.parametrize("plan", PLANS)
def test_scores_are_the_same_to_the_last_bit(tiny: Path, plan: str, spill_directory: Path) -> None:
    planned = load_planned(tiny, **PLANS[plan])
    for seed in range(2):
        scores = planned.score([(QUERY, text) for text in texts(seed)])
        assert scores == whole_scores(tiny, seed)
        assert scores == pytest.approx(padded(tiny, seed), abs=TOLERANCE)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("scores", ["exact", "estimated"])
def test_pruning_under_every_plan(tiny_bert: Path, plan: str, scores: str, spill_directory: Path) -> None:
    for policy in POLICIES:
        planned = load_planned(tiny_bert, pruning=POLICIES[policy], **PLANS[plan])
        for seed in range(3):
            expected = whole_result(tiny_bert, policy, seed, scores)
            found = planned.rerank(QUERY, texts(seed, 20), 3, scores=scores)
            assert found.ranking == expected.ranking
            assert [layer.scores for layer in found.trace.layers] == [
                layer.scores for layer in expected.trace.layers
            ]


def test_a_forward_that_ends_early_leaves_nothing_for_the_next_to_trip_over(tiny_bert: Path) -> None:
    class SelectAtOnce:
        def __init__(self) -> None:
            self.layer = 1

        def route(self, layer, scores, top_k):
            best = set(scores.argsort()[-top_k:].tolist()) if layer >= self.layer else ()
            return [Route.SELECTED if index in best else Route.DEFERRED for index in range(len(scores))]

    policy = SelectAtOnce()
    whole, planned = load_planned(tiny_bert, pruning=policy), load_planned(tiny_bert, pruning=policy, resident=())
    for layer in (1, 3, 4, 1, 9, 2):
        policy.layer = layer
        documents = texts(layer)
        for scores in ("estimated", "exact"):
            expected = whole.rerank(QUERY, documents, 2, scores=scores)
            found = planned.rerank(QUERY, documents, 2, scores=scores)
            assert found.ranking == expected.ranking
            assert len(found.trace.layers) == len(expected.trace.layers)


def test_other_slices_change_scores_by_rounding_only(tiny: Path) -> None:
    pairs = [(QUERY, text) for text in texts(4, 6)]
    expected = load_planned(tiny).score(pairs)
    for slice_tokens, relative in ((1, 1e-5), (3, 1e-5), (16, 0), (100, 0), (10_000, 0)):
        scores = load_planned(tiny, slice_tokens=slice_tokens, resident=()).score(pairs)
        # Matrices are multiplied by other kernels for a few tokens.
        assert scores == pytest.approx(expected, abs=1e-5, rel=relative)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16])
def test_every_dtype_on_disk_and_in_memory(tmp_path: Path, stored, computed, spill_directory: Path) -> None:
    from safetensors.torch import load_file, save_file

    directory = save_model(tmp_path / "model", "bert", max_shard_size="40KB")
    for path in directory.glob("*.safetensors"):
        save_file({name: weight.to(stored) for name, weight in load_file(path).items()}, path, {"format": "pt"})
    pairs = [(QUERY, text) for text in texts(5)]
    planned = load_planned(directory, dtype=computed, **PLANS["all at once"])
    assert planned.score(pairs) == load_planned(directory, dtype=computed).score(pairs)
    if computed == torch.float32:
        assert planned.score(pairs) == pytest.approx(padded_scores(directory, pairs), abs=TOLERANCE)


def test_threads_take_turns(tiny_bert: Path, spill_directory: Path) -> None:
    planned = load_planned(tiny_bert, **PLANS["all at once"])
    expected = [planned.rerank(QUERY, texts(seed)).ranking for seed in range(8)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda seed: planned.rerank(QUERY, texts(seed % 8)).ranking, range(16)))
    assert found == expected * 2


def test_the_trace_tells_of_the_disk(tiny_bert: Path, spill_directory: Path) -> None:
    planned = load_planned(tiny_bert, **PLANS["all at once"])
    documents = texts(6)
    first, second = planned.rerank(QUERY, documents).trace, planned.rerank(QUERY, documents).trace
    weights = planned.plan.bytes_read()
    for trace in (first, second):
        assert trace.bytes_read >= weights > 0
        assert sum(layer.bytes_read for layer in trace.layers) <= trace.bytes_read
        assert 0 <= sum(layer.seconds_waited for layer in trace.layers) <= trace.seconds_waited <= trace.seconds
        assert trace.bytes_spilled == planned.plan.bytes_spilled(sum(trace.lengths)) > 0
        assert 0 <= trace.embedding_hit_rate <= 1
        assert trace.peak_memory > 10_000_000
    roomy = load_planned(tiny_bert, embedding_rows=150)
    assert roomy.rerank("w1", ["w2 w3"]).trace.embedding_hit_rate == 0
    assert roomy.rerank("w1", ["w3 w2"]).trace.embedding_hit_rate == 1
    resident = load_planned(tiny_bert).rerank(QUERY, documents).trace
    assert (resident.bytes_read, resident.bytes_spilled, resident.embedding_hit_rate) == (0, 0, None)
