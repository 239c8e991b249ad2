"""The pace of layers, and who goes on when time is short."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grating_core import Route
from grating_core.pruning.deadline import Pace, Race, first_that_fit

LAYERS = 6


def pace_of(fixed: float, by_token: float) -> Pace:
    pace = Pace()
    for tokens in (1000, 600, 400, 900):
        pace = pace.learnt(tokens, fixed + by_token * tokens)
    return pace


@given(fixed=st.floats(0, 5), by_token=st.floats(0, 1))
def test_a_pace_tells_fixed_costs_from_those_of_tokens(fixed: float, by_token: float) -> None:
    pace = pace_of(fixed, by_token)
    assert pace.fixed == pytest.approx(fixed, abs=1e-6)
    assert pace.by_token == pytest.approx(by_token, abs=1e-8)
    assert pace.seconds_of(200) == pytest.approx(fixed + 200 * by_token, abs=1e-5)


def test_layers_of_the_same_size_leave_nothing_to_tell_apart() -> None:
    pace = Pace().learnt(100, 2.0)
    assert (pace.fixed, pace.by_token) == (0.0, 0.02)
    for _ in range(50):
        pace = pace.learnt(100, 4.0)
    assert pace.seconds_of(100) == pytest.approx(4.0, abs=0.01)  # the latest count


def test_a_noisy_pace_is_never_negative() -> None:
    pace = Pace().learnt(1000, 1.0).learnt(500, 3.0)
    assert pace.by_token == 0
    assert pace.fixed > 0


@st.composite
def races(draw: st.DrawFn) -> Race:
    count = draw(st.integers(2, 12))
    scores = np.array(draw(st.lists(st.floats(-5, 5), min_size=count, max_size=count)))
    tokens = np.array(draw(st.lists(st.integers(1, 50), min_size=count, max_size=count)))
    errors = np.array(draw(st.lists(st.floats(0, 3), min_size=LAYERS, max_size=LAYERS)))
    return Race(scores, draw(st.integers(1, count - 1)), tokens, errors, draw(st.floats(0, 3)) * errors)


@given(race=races(), seconds=st.floats(-1, 3000), beside=st.integers(0, 100), fixed=st.sampled_from([0.0, 2.0]))
def test_who_is_selected_or_goes_on_suffices_and_the_next_layer_fits(
    race: Race, seconds: float, beside: int, fixed: float
) -> None:
    pace = pace_of(fixed, 1.0)
    routes = race.routes(pace, beside, seconds)
    assert routes.count(Route.SELECTED) <= race.wanted <= len(routes) - routes.count(Route.DROPPED)
    least = min((race.scores[i] for i, route in enumerate(routes) if route is Route.SELECTED), default=np.inf)
    most = max((race.scores[i] for i, route in enumerate(routes) if route is Route.DROPPED), default=-np.inf)
    assert most <= least
    if going_on := [race.tokens[i] for i, route in enumerate(routes) if route is Route.DEFERRED]:
        assert pace.seconds_of(beside + sum(going_on)) <= seconds + 1e-6


@given(race=races())
def test_more_time_never_lets_fewer_go_on_where_all_layers_fit(race: Race) -> None:
    pace = pace_of(0.0, 1.0)
    counts = [race.routes(pace, 0, seconds).count(Route.DEFERRED) for seconds in (1e3, 2e3, 1e4)]
    assert counts == sorted(counts)
    assert counts[-1] == len(race.scores)
    assert race.fits(pace, 0, 1e4)


def test_margins_of_the_policy_are_foreseen() -> None:
    scores, tokens = np.array([3.0, 2.0, -9.0, -9.0]), np.array([10, 10, 10, 10])
    race = Race(scores, 2, tokens, np.ones(2), np.array([20.0, 1.0]))
    pace = pace_of(0.0, 1.0)
    assert race.fits(pace, 0, 60.1)  # four candidates, then two
    assert not race.fits(pace, 0, 59)
    assert not race.fits(pace, 5, 60.1)


def test_the_first_that_fit_are_one_at_least() -> None:
    pace = pace_of(1.0, 1.0)
    assert first_that_fit(np.full(3, 5), 2, pace, 0, 22.1) == 2
    assert first_that_fit(np.full(3, 5), 2, pace, 3, 22.1) == 1
    assert first_that_fit(np.full(3, 5), 2, pace, 0, 0.0) == 1
