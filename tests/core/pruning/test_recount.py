"""Who is in doubt: those on both sides of the bar whose scores may be off by more than their distance from it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grating_core.pruning.recount import in_doubt


def marked(scores: list[float], top_k: int, doubt: float) -> list[int]:
    return np.flatnonzero(in_doubt(np.array([scores]), np.array([top_k]), doubt)[0]).tolist()


def test_both_sides_of_the_bar_are_in_doubt() -> None:
    scores = [5.0, 3.0, 2.8, 2.7, 1.0]  # the bar of the top 2 is at 2.9
    assert marked(scores, 2, 0.05) == []
    assert marked(scores, 2, 0.11) == [1, 2]
    assert marked(scores, 2, 0.25) == [1, 2, 3]
    assert marked(scores, 2, 10) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("scores", "top_k"), [([1.0], 1), ([1.0, 1.0], 0), ([1.0, 1.0], 2), ([1.0, -np.inf], 1)])
def test_what_is_decided_is_not_in_doubt(scores: list[float], top_k: int) -> None:
    with np.errstate(all="raise"):
        assert marked(scores, top_k, 1.0) == []


def test_equal_scores_are_in_any_doubt() -> None:
    assert marked([2.0, 1.0, 1.0, 0.0], 2, 0.0) == [1, 2]


@given(
    st.lists(st.floats(-12, 12, width=32), min_size=2, max_size=30, unique=True),
    st.lists(st.floats(-0.2, 0.2), min_size=30, max_size=30),
    st.integers(1, 29),
)
def test_errors_within_the_doubt_change_no_top_k(scores: list[float], errors: list[float], top_k: int) -> None:
    full = np.array(scores)
    top_k = min(top_k, len(full) - 1)
    rough = full + errors[: len(full)]
    # The bar is off by no more than a score is, so twice the error covers the distance of any that may change.
    again = in_doubt(rough[None], np.array([top_k]), 0.4 + 1e-9)[0]
    settled = np.where(again, full, rough)
    assert set(np.argsort(-settled)[:top_k]) == set(np.argsort(-full)[:top_k])
