"""The record of a rerank, made by hand; tests of the reranker check the real ones."""

import dataclasses
import json

import pytest

from grating_core import Route, Trace
from grating_core.results import LayerTrace, RankedDocument

D, L = Route.DEFERRED, Route.DROPPED


def layer(number: int, *alive: int, tokens: int) -> LayerTrace:
    return LayerTrace(number, alive, (D,) * len(alive), (0.0,) * len(alive), tokens, 0.1)


@pytest.mark.parametrize(
    ("layers", "share"),
    [
        ([layer(1, 0, 1, tokens=10), layer(2, 0, 1, tokens=10)], 1.0),
        ([layer(1, 0, 1, tokens=10), layer(2, 0, tokens=4)], 0.7),
        ([layer(1, 0, 1, tokens=10)], 0.5),  # stopped early
        ([layer(1, 0, 1, tokens=10), layer(2, 0, tokens=1)], 0.55),
    ],
)
def test_compute_share_counts_tokens_times_layers(layers: list[LayerTrace], share: float) -> None:
    trace = Trace(tuple(layers), depth=2, lengths=(4, 6), truncated=(), seconds=1.0)
    assert trace.compute_share == pytest.approx(share)


def test_nothing_to_compute_is_a_share_of_one() -> None:
    assert Trace((), depth=12, lengths=(), truncated=(), seconds=0.0).compute_share == 1.0


def test_the_summary_is_json_and_counts_candidates() -> None:
    layers = (layer(0, 0, 1, 2, tokens=0), layer(1, 0, 2, tokens=9), layer(2, 2, tokens=5))
    trace = Trace(layers, depth=2, lengths=(4, 6, 5), truncated=(1,), seconds=0.5, bytes_read=7)
    summary = trace.summary()
    assert json.loads(json.dumps(summary)) == summary
    assert summary["alive"] == [2, 1]
    assert summary["compute_share"] == trace.compute_share
    assert (summary["candidates"], summary["tokens"], summary["truncated"]) == (3, 15, [1])
    assert (summary["seconds"], summary["bytes_read"], summary["peak_memory"]) == (0.5, 7, None)
    assert summary["kernels"] == "torch"


def test_results_are_values() -> None:
    document = RankedDocument(3, 1.5, "text", 0.8)
    assert document == RankedDocument(index=3, score=1.5, text="text", probability=0.8, estimated=False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        document.score = 2.0  # type: ignore[misc]


def test_routes_are_written_as_their_words() -> None:
    assert [route.value for route in Route] == ["selected", "dropped", "deferred"]
    assert Route("dropped") is L
