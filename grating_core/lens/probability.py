"""A raw score means a probability."""

from __future__ import annotations

from math import exp


def logistic(score: float) -> float:
    """Return the logistic function of a score."""
    odds = exp(-abs(score))  # a large exponent would overflow
    return (1.0 if score >= 0 else odds) / (1.0 + odds)
