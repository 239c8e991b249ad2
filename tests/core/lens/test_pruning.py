"""How a request is pruned, and what "auto" does with a model that has no lens."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from grating_core import ClusterPolicy, Request
from grating_core.lens.pruning import ByLens, Pruning, plan_pruning, pruning_of
from grating_core.pruning import Off
from tests.core.conftest import save_model
from tests.core.lens.test_store import calibrated
from tests.core.parity import load

QUERY = "w1 w2"
DOCUMENTS = [f"w{n} w{n + 1} w{3 * n}" for n in range(12)]


def test_a_policy_is_taken_as_it_is() -> None:
    policy = ClusterPolicy(0.5)
    assert plan_pruning(policy, 20, 5, exact=False) == Pruning(policy, None, exact=False)
    assert plan_pruning(policy, 20, 5, exact=True, factor=3.0).policy == ClusterPolicy(1.5)


def test_a_lens_reads_only_where_something_can_be_dropped() -> None:
    lens = calibrated("identity")
    careless, careful = (ByLens(target, "share", lens) for target in (0.5, 0.995))
    planned = plan_pruning(careless, 20, 5, exact=True)
    assert planned.lens is lens.lens
    assert planned.policy == lens.margins.policy(20, 5, target=0.5, guarantee="share", exact=True)
    nothing = Pruning(Off(), None, exact=True)
    assert plan_pruning(careless, 5, 5, exact=True) == nothing
    assert plan_pruning(careful, 20, 5, exact=True) == nothing  # no factor keeps that promise
    assert plan_pruning(ByLens(0.5, "share", None), 20, 5, exact=True) == nothing


def test_a_request_may_have_a_target_of_its_own() -> None:
    lens = calibrated("identity")
    by = ByLens(0.995, "share", lens)
    request = Request("w1", ["w2"] * 20, 5, target=0.5)
    assert pruning_of(request, by, 1.0) == plan_pruning(replace(by, target=0.5), 20, 5, exact=True)
    assert pruning_of(request, by, 1.0).policy != Off()
    assert pruning_of(request, Off(), 1.0) == Pruning(Off())


def test_without_a_lens_nothing_is_dropped_and_that_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = save_model(tmp_path, "bert")
    expected = load(directory).rerank(QUERY, DOCUMENTS, 3)
    caplog.set_level(logging.INFO, "grating")
    reranker = load(directory, pruning="auto")
    reranker.rerank(QUERY, DOCUMENTS, 12)
    assert caplog.text == ""  # nothing could be dropped
    for _ in range(2):
        found = reranker.rerank(QUERY, DOCUMENTS, 3)
        assert found.ranking == expected.ranking
        assert found.trace.compute_share == 1
    assert (
        load(directory, pruning="auto").rerank(QUERY, DOCUMENTS, 3, scores="estimated").ranking == expected.ranking
    )
    (told,) = caplog.messages
    assert "grating calibrate" in told
    assert "Reranker.calibrate" in told
    assert str(directory) in told
