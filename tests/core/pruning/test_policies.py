"""What every policy owes the engine, and what the published one decides."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grating_core import ClusterPolicy, PruningPolicy, Route
from grating_core.pruning import Off
from grating_core.pruning.cluster import dispersion

S, D, L = Route.SELECTED, Route.DEFERRED, Route.DROPPED
POLICIES = st.one_of(
    st.just(Off()),
    st.builds(ClusterPolicy, st.sampled_from([0.0, 0.05, 1.0, 8.0, float("inf")]), st.integers(2, 6)),
)
SCORE = st.one_of(st.floats(-1e30, 1e30), st.sampled_from([-1.0, 0.0, 1e-300, 1.0, 1.0 + 1e-12]))


@st.composite
def situations(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    scores = np.array(draw(st.lists(SCORE, min_size=2, max_size=40)))
    return scores, draw(st.integers(1, len(scores) - 1))


@given(policy=POLICIES, situation=situations())
def test_routes_partition_the_candidates_around_the_top_k(
    policy: PruningPolicy, situation: tuple[np.ndarray, int]
) -> None:
    scores, top_k = situation
    routes = policy.route(1, scores, top_k)
    assert len(routes) == len(scores)
    assert set(routes) <= {S, D, L}
    assert routes.count(S) <= top_k <= len(scores) - routes.count(L)
    # No candidate is treated worse than one that it does not lose to.
    rank = {S: 2, D: 1, L: 0}
    order = np.argsort(-scores)
    ranks = [rank[routes[i]] for i in order]
    assert ranks == sorted(ranks, reverse=True)


@given(policy=POLICIES, situation=situations(), random=st.randoms())
def test_the_order_of_documents_does_not_matter(
    policy: PruningPolicy, situation: tuple[np.ndarray, int], random: object
) -> None:
    scores, top_k = situation
    routes = policy.route(1, scores, top_k)
    order = list(range(len(scores)))
    random.shuffle(order)  # type: ignore[attr-defined]
    shuffled = policy.route(1, scores[order], top_k)
    assert [routes[i] for i in order] == list(shuffled)


@pytest.mark.parametrize(
    ("top_k", "expected"),
    [
        (1, [D, L, L, L, L, L]),
        (2, [S, D, D, L, L, L]),
        (3, [S, D, D, L, L, L]),
        (4, [S, S, S, D, D, D]),
        (5, [S, S, S, D, D, D]),
    ],
)
def test_the_boundary_cluster_is_deferred(top_k: int, expected: list[Route]) -> None:
    scores = np.array([9.0, 1.0, 1.1, -5.0, -5.2, -4.9])
    assert ClusterPolicy(dispersion_threshold=0.5, clusters=3).route(1, scores, top_k) == expected


def test_nothing_happens_below_the_threshold() -> None:
    scores = np.array([10.0, 10.1, 9.9, 8.0])
    spread = dispersion(scores)
    assert spread == pytest.approx(np.std(scores) / 9.5)
    assert ClusterPolicy(spread).route(1, scores, 1) == [D] * 4
    assert L in ClusterPolicy(spread * 0.99).route(1, scores, 1)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [([0.0, 0.0], 0.0), ([0.1] * 3, 0.0), ([-1.0, 1.0], float("inf")), ([-1.0, -3.0], 0.5), ([1e-300, 0.0], 1.0)],
)
def test_dispersion_at_the_edges(scores: list[float], expected: float) -> None:
    assert dispersion(np.array(scores)) == pytest.approx(expected)


def test_settings_that_mean_nothing_are_refused() -> None:
    for threshold in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="dispersion_threshold="):
            ClusterPolicy(threshold)
    for clusters in (1, 0):
        with pytest.raises(ValueError, match=f"clusters={clusters}"):
            ClusterPolicy(1.0, clusters)
