"""Thresholds that frameworks hand over are finite numbers."""

import math

import pytest

from grating_core.frameworks.requests import check_threshold


@pytest.mark.parametrize("threshold", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scores", ["exact", "estimated"])
def test_a_threshold_that_is_no_number_is_refused(threshold: float, scores: str) -> None:
    with pytest.raises(ValueError, match=f"score_threshold={threshold} must be a finite number"):
        check_threshold(threshold, scores)


def test_thresholds_that_are_logits_pass() -> None:
    for threshold in (None, -3.5, 1.1, 12):
        check_threshold(threshold, "exact")
