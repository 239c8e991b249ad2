"""The pace of layers, and who goes on when time is short."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grating_core import Route
from grating_core.pruning.deadline import Costs, Pace, Race, first_that_fit

LAYERS = 6


def costs_of(fixed: float, by_token: float) -> Costs:
    return Costs(np.full(LAYERS, fixed), np.full(LAYERS, by_token))


@given(fixed=st.floats(0, 5), by_token=st.floats(0.001, 1))
def test_a_pace_tells_fixed_costs_from_those_of_tokens(fixed: float, by_token: float) -> None:
    pace = Pace()
    for tokens in (4000, 2000, 1000, 200, 100) * 20:
        pace = pace.learnt(tokens, fixed + by_token * tokens)
    for tokens in (100, 300, 1500, 8000):
        assert pace.seconds_of(tokens) == pytest.approx(fixed + by_token * tokens, rel=0.2)


def test_layers_of_the_same_size_leave_nothing_to_tell_apart() -> None:
    pace = Pace().learnt(100, 2.0)
    assert (pace.fixed, pace.by_token) == (0.0, 0.02)
    for _ in range(20):
        pace = pace.learnt(100, 4.0)
    assert pace.seconds_of(100) == pytest.approx(4.0, rel=0.01)  # the latest count
    assert pace.seconds_of(1000) == pytest.approx(40.0, rel=0.01)


def test_a_noisy_pace_is_never_negative_and_no_token_is_free() -> None:
    pace = Pace().learnt(1000, 1.0).learnt(900, 1.6).learnt(1000, 1.1)
    assert pace.by_token > 0
    assert pace.fixed > 0
    assert pace.seconds_of(5000) > 2 * pace.seconds_of(1000)
    assert Pace().learnt(10, 0.0).seconds_of(10) == 0


@st.composite
def races(draw: st.DrawFn) -> Race:
    count = draw(st.integers(2, 12))
    scores = np.array(draw(st.lists(st.floats(-5, 5), min_size=count, max_size=count)))
    tokens = np.array(draw(st.lists(st.integers(1, 50), min_size=count, max_size=count)))
    errors = np.array(draw(st.lists(st.floats(0, 3), min_size=LAYERS, max_size=LAYERS)))
    looks = np.array([*draw(st.lists(st.booleans(), min_size=LAYERS - 1, max_size=LAYERS - 1)), True])
    margins = draw(st.floats(0, 3)) * errors
    return Race(scores, draw(st.integers(1, count - 1)), tokens, errors, looks, margins)


@given(race=races(), seconds=st.floats(-1, 3000), beside=st.integers(0, 100), fixed=st.sampled_from([0.0, 2.0]))
def test_who_is_selected_or_goes_on_suffices_and_the_next_layer_fits(
    race: Race, seconds: float, beside: int, fixed: float
) -> None:
    costs = costs_of(fixed, 1.0)
    routes = race.routes(costs, beside, seconds)
    assert routes.count(Route.SELECTED) <= race.wanted <= len(routes) - routes.count(Route.DROPPED)
    least = min((race.scores[i] for i, route in enumerate(routes) if route is Route.SELECTED), default=np.inf)
    most = max((race.scores[i] for i, route in enumerate(routes) if route is Route.DROPPED), default=-np.inf)
    assert most <= least
    if going_on := [race.tokens[i] for i, route in enumerate(routes) if route is Route.DEFERRED]:
        assert costs.seconds(beside + sum(going_on))[0] <= seconds + 1e-6


@given(race=races())
def test_more_time_never_lets_fewer_go_on_where_all_layers_fit(race: Race) -> None:
    # Whoever may stop after an earlier layer lets more go on in less time, so only the head looks here.
    race = replace(race, looks=np.arange(LAYERS) == LAYERS - 1)
    costs = costs_of(0.0, 1.0)
    counts = [race.routes(costs, 0, seconds).count(Route.DEFERRED) for seconds in (1e3, 2e3, 1e4)]
    assert counts == sorted(counts)
    assert counts[-1] == len(race.scores)
    assert race.fits(costs, 0, 1e4)


def test_margins_of_the_policy_are_foreseen() -> None:
    scores, tokens = np.array([3.0, 2.0, -9.0, -9.0]), np.array([10, 10, 10, 10])
    race = Race(scores, 2, tokens, np.ones(2), np.ones(2, dtype=bool), np.array([20.0, 1.0]))
    costs = Costs(np.zeros(2), np.array([1.0, 0.5]))
    assert race.fits(costs, 0, 50.1)  # four candidates, then two at half the price
    assert not race.fits(costs, 0, 49)
    assert not race.fits(costs, 5, 50.1)


def test_nobody_goes_on_who_would_stop_before_the_next_look() -> None:
    scores, tokens = np.array([3.0, 1.0, 0.9, 0.8, -2.0]), np.full(5, 10)
    errors, costs = np.array([1.0, 1.0, 1.0, 0.1]), Costs(np.zeros(4), np.ones(4))
    for seconds in (25, 35, 65):
        going_on = []
        for looks in ([True, True, True, True], [False, False, True, True]):
            race = Race(scores, 2, tokens, errors, np.array(looks), np.full(4, np.inf))
            going_on.append(race.routes(costs, 0, seconds).count(Route.DEFERRED))
        often, seldom = going_on
        assert seldom == int(seconds // 30) <= often


def test_the_first_that_fit_are_one_at_least() -> None:
    costs = Costs(np.ones(2), np.ones(2))
    assert first_that_fit(np.full(3, 5), costs, 0, 22.1) == 2
    assert first_that_fit(np.full(3, 5), costs, 3, 22.1) == 1
    assert first_that_fit(np.full(3, 5), costs, 0, 0.0) == 1
