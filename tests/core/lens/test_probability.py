"""A raw score means a probability."""

import math

import pytest

from grating_core.lens.probability import logistic


@pytest.mark.parametrize(
    ("score", "probability"),
    [(0.0, 0.5), (math.log(3), 0.75), (-math.log(3), 0.25), (800.0, 1.0), (-800.0, 0.0), (-40.0, math.exp(-40))],
)
def test_the_logistic_function_of_any_score(score: float, probability: float) -> None:
    assert logistic(score) == pytest.approx(probability, rel=1e-12)
