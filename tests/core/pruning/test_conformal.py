"""The promise, on synthetic scores: what calibration bounds is kept on requests it has not seen."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grating_core.arguments import Guarantee
from grating_core.pruning import MarginPolicy, Margins, Route
from grating_core.pruning.conformal import Requests, bound_loss, calibrate_margins, replay_pruning
from grating_core.pruning.looks import choose_looks

LAYERS = 6
SPREAD = np.linspace(3, 0.3, LAYERS)
FREE = [0.0] * LAYERS  # what a look costs


def synthetic(count: int, candidates: int, seed: int, noise: float = 1.0) -> Requests:
    """Scores, and estimates of them that are off by less and less, in a way that lasts over the layers.

    The first stage has put the likeliest candidates first.
    """
    chance = np.random.default_rng(seed)
    scores = chance.normal(scale=3, size=(count, candidates)) - np.minimum(np.arange(candidates) / 5, 4)
    lasting = chance.normal(size=(count, candidates, 1))
    errors = 0.6 * lasting + 0.8 * chance.standard_t(4, size=(count, candidates, LAYERS)) / np.sqrt(2)
    tokens = chance.integers(5, 300, size=(count, candidates))
    return Requests(scores[:, :, None] + noise * errors * SPREAD, scores, tokens)


@pytest.fixture(scope="module")
def margins() -> Margins:
    cells = [(number, wanted) for number in (5, 10, 20, 80) for wanted in (1, 3, 5, 10) if wanted < number]
    return calibrate_margins([[synthetic(300, 20, seed=1)]], SPREAD, FREE, cells=cells)


def lost(requests: Requests, policy: MarginPolicy, top_k: int, exact: bool) -> np.ndarray:
    select = None if exact else np.array(policy.select)
    return replay_pruning(requests, top_k, drop=np.array(policy.drop), select=select).lost


@pytest.fixture(scope="module")
def repeated() -> list[tuple[Margins, Requests]]:
    """Calibrations, each with requests that it has not seen."""
    return [
        (
            calibrate_margins([[synthetic(120, 10, seed=10 + seed)]], SPREAD, FREE, cells=[(10, 3)]),
            synthetic(400, 10, seed=100 + seed),
        )
        for seed in range(8)
    ]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("guarantee", ["share", "set"])
@pytest.mark.parametrize("target", [0.9, 0.95, 0.98])
def test_the_promise_holds_on_average_over_calibrations(
    repeated: list[tuple[Margins, Requests]], exact: bool, guarantee: Guarantee, target: float
) -> None:
    losses = []
    for margins, requests in repeated:
        policy = margins.policy(10, 3, target=target, guarantee=guarantee, exact=exact)
        found = lost(requests, policy, 3, exact)
        losses.append(found.mean() if guarantee == "share" else (found > 0).mean())
    # Three standard errors of a mean over 8 calibrations and 3,200 requests, as the losses scatter here.
    allowed = 3 * np.std(losses) / np.sqrt(8)
    assert np.mean(losses) <= 1 - target + allowed
    assert np.mean(losses) > (1 - target) / 20  # it does prune


@pytest.mark.parametrize(
    ("candidates", "top_k"), [(20, 5), (20, 4), (13, 4), (7, 3), (20, 12), (40, 5), (60, 10), (80, 5)]
)
@pytest.mark.parametrize("exact", [True, False])
def test_other_numbers_of_candidates_than_calibrated(
    margins: Margins, candidates: int, top_k: int, exact: bool
) -> None:
    policy = margins.policy(candidates, top_k, target=0.95, guarantee="share", exact=exact)
    requests = synthetic(800, candidates, seed=2)
    # More candidates than were computed are drawn from others, which is less sure.
    assert lost(requests, policy, top_k, exact).mean() <= 0.05 + (0.005 if candidates <= 20 else 0.015)
    select = None if exact else np.array(policy.select)
    assert replay_pruning(requests, top_k, drop=np.array(policy.drop), select=select).compute_share.mean() < 0.95


def test_more_is_promised_with_wider_margins(margins: Margins) -> None:
    how = {"guarantee": "share", "exact": True}
    factors = [margins.factor(20, 5, target=target, **how) for target in (0.8, 0.9, 0.95, 0.98, 0.99)]
    assert factors == sorted(factors)
    assert factors[0] < factors[-1] < np.inf
    assert margins.factor(20, 5, target=0.95, guarantee="set", exact=True) > factors[2]
    assert margins.factor(100, 5, target=0.95, **how) > factors[2]


def test_too_few_requests_for_a_promise_prune_nothing() -> None:
    """Not one of 40 requests lost anything: that is evidence for 1 - 1/41, and not for more."""
    requests = synthetic(40, 10, seed=3, noise=1e-6)
    margins = calibrate_margins([[requests]], SPREAD, FREE, cells=[(10, 3)])
    how = {"guarantee": "share", "exact": True}
    assert margins.factor(10, 3, target=1 - 1 / 40.9, **how) == margins.factors[0]
    assert margins.factor(10, 3, target=1 - 1 / 41.1, **how) == np.inf
    policy = margins.policy(10, 3, target=0.99, **how)
    assert set(policy.route(0, requests.estimates[0, :, 0], 3)) == {Route.DEFERRED}


def test_batches_count_by_their_requests() -> None:
    requests = synthetic(150, 10, seed=4)
    parts = [
        Requests(requests.estimates[some], requests.scores[some], requests.tokens[some])
        for some in (slice(50), slice(50, 150))
    ]
    together, divided = (calibrate_margins([some], SPREAD, FREE, cells=[(10, 3)]) for some in ([requests], parts))
    np.testing.assert_allclose(divided.bounds, together.bounds)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.integers(1, 1000))
def test_corpora_that_differ_raise_the_bound(losses: list[float], requests: int) -> None:
    bound = float(bound_loss(np.array(losses), requests))
    assert np.mean(losses) <= bound <= 1
    # Where corpora are alike, only the number of requests counts.
    alike = np.full(len(losses), np.mean(losses))
    assert bound_loss(alike, requests) == pytest.approx((requests * np.mean(losses) + 1) / (requests + 1))
    assert bound >= bound_loss(alike, requests) - 1e-12


def test_a_corpus_that_loses_much_is_heard() -> None:
    calm, wild = synthetic(100, 20, seed=5), synthetic(100, 20, seed=6, noise=2.5)
    apart, together = (
        calibrate_margins(corpora, SPREAD, FREE, cells=[(20, 5)]).bounds
        for corpora in ([[calm], [wild]], [[calm, wild]])
    )
    assert (apart >= together).all()
    assert (apart > together + 0.01).any()


def test_larger_requests_draw_from_all_last_halves() -> None:
    requests = synthetic(3, 6, seed=7)
    larger = requests.grown(11)
    assert larger.first(6).scores.tolist() == requests.scores.tolist()
    assert larger.estimates.shape == (3, 11, LAYERS)
    assert larger.tokens.min() >= 1
    last = requests.scores[:, 3:] - requests.scores[:, 3:].mean(1, keepdims=True)
    drawn = larger.scores[:, 6:9] - requests.scores[:, 3:].mean(1, keepdims=True)
    np.testing.assert_allclose(drawn, last[[2, 0, 1]])
    # An estimate is as far off as it was.
    errors = requests.estimates - requests.scores[:, :, None]
    moved = larger.estimates[1, 6:9] - larger.scores[1, 6:9, None]
    shift = errors[1, 3:].mean(0) - errors[0, 3:].mean(0)
    np.testing.assert_allclose(moved, errors[0, 3:] + shift)


def test_looks_that_cost_more_than_they_save_are_left_out() -> None:
    alive = np.array([0.99, 0.95, 0.6, 0.6, 0.3])
    assert choose_looks(alive, [0.0] * 5).tolist() == [True, True, True, False, True]
    assert choose_looks(alive, [0.03] * 5).tolist() == [False, True, True, False, True]
    # A look that comes later drops what those before it would have dropped.
    assert choose_looks(alive, [0.2, 0.2, 0.2, 0.2, 0.2]).tolist() == [False, False, True, False, True]
    assert not choose_looks(alive, [2.0] * 5).any()


def test_what_was_not_looked_at_in_the_replays_is_not_looked_at() -> None:
    costs = [10.0, 10.0, *FREE[2:]]
    margins = calibrate_margins([[synthetic(120, 20, seed=8)]], SPREAD, costs, cells=[(10, 3), (20, 3)])
    for candidates in (10, 15, 20, 30):
        policy = margins.policy(candidates, 3, target=0.9, guarantee="share", exact=True)
        assert [policy.looks(layer) for layer in range(LAYERS)] == [False, False, True, True, True, True]
    seen = margins.looks.copy()
    seen[1, 2] = False
    fewer = replace(margins, looks=seen).policy(15, 3, target=0.9, guarantee="share", exact=True)
    assert not fewer.looks(2)
    assert fewer.looks(3)


def replayed(
    requests: Requests, number: int, policy: MarginPolicy, top_k: int, exact: bool
) -> tuple[set[int], float]:
    """What the policy's own routes lead to for one request: the winners and the share computed."""
    estimates, scores, tokens = requests.estimates[number], requests.scores[number], requests.tokens[number]
    alive, winners, computed = list(range(len(scores))), [], 0
    for layer in range(LAYERS):
        wanted = top_k - len(winners)
        if wanted < len(alive) and policy.looks(layer):
            routes = policy.route(layer, estimates[alive, layer], wanted)
            if not exact:
                winners += [i for i, route in zip(alive, routes, strict=True) if route is Route.SELECTED]
            stopped = (Route.DROPPED,) if exact else (Route.DROPPED, Route.SELECTED)
            alive = [i for i, route in zip(alive, routes, strict=True) if route not in stopped]
            if not exact and top_k - len(winners) in (0, len(alive)):
                winners += alive[: top_k - len(winners)]
                alive = []
                break
        computed += tokens[alive].sum()
    winners += sorted(alive, key=lambda i: -scores[i])[: top_k - len(winners)]
    return set(winners), computed / (LAYERS * tokens.sum())


@given(st.integers(0, 10**6), st.integers(2, 9), st.floats(0, 3), st.floats(0, 3), st.booleans(), st.data())
def test_the_simulation_does_what_the_routes_say(
    seed: int, candidates: int, drop: float, select: float, exact: bool, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, candidates - 1))
    requests = synthetic(4, candidates, seed)
    looks = np.array(data.draw(st.lists(st.booleans(), min_size=LAYERS, max_size=LAYERS)))
    policy = MarginPolicy(*(tuple(np.where(looks, factor * SPREAD, np.inf)) for factor in (drop, select)))
    found = replay_pruning(
        requests, top_k, drop=np.array(policy.drop), select=None if exact else np.array(policy.select)
    )
    for number in range(4):
        winners, share = replayed(requests, number, policy, top_k, exact)
        best = set(np.argsort(-requests.scores[number])[:top_k].tolist())
        assert found.lost[number] == pytest.approx(len(best - winners) / top_k)
        assert found.compute_share[number] == pytest.approx(share)
