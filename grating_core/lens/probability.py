"""A raw score means a probability: by the logistic function, or by a mapping that was fitted to judgements."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from math import exp, isfinite
from numbers import Real
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from grating_core.arguments import elements
from grating_core.errors import StorageError
from grating_core.files.places import go_on_without_cache, is_kept
from grating_core.files.reading import read_json
from grating_core.files.writing import replace_file
from grating_core.lens.store import lens_directory

Probability = Callable[[float], float]
"""A function from a raw score to a probability."""

Method = Literal["platt", "isotonic"]
"""Platt's method fits a logistic function; isotonic regression fits any function that does not fall."""

FEWEST = 10
"""The fewest relevant texts, and the fewest others, that a mapping is fitted to."""

MANY = 1000
"""The number of judged pairs from which isotonic regression is used. With fewer it follows chance."""

_FILE = "probabilities.json"
_FORMAT = 1

_log = logging.getLogger("grating")


def logistic(score: float) -> float:
    """Return the logistic function of a score."""
    odds = exp(-abs(score))  # a large exponent would overflow
    return (1.0 if score >= 0 else odds) / (1.0 + odds)


def between_0_and_1(cosine: float) -> float:
    """Return a cosine on the scale from 0 to 1. This keeps the order; it is no chance that judgements confirm."""
    return min(1.0, max(0.0, (1.0 + cosine) / 2.0))


@dataclass(frozen=True)
class FittedProbability:
    """This mapping from raw scores to probabilities was fitted to judgements. It never falls.

    The logit of the probability goes straight from point to point. Beyond the points it goes on straight with
    Platt's method, and stays level with isotonic regression.

    Attributes:
        method: ``"platt"`` or ``"isotonic"``.
        scores: The raw scores of the points, ascending.
        logits: The logits of their probabilities.
        pairs: Number of judged pairs that the mapping was fitted to.
        relevant: Number of them that are relevant.
    """

    method: Method
    scores: tuple[float, ...]
    logits: tuple[float, ...]
    pairs: int
    relevant: int

    def __post_init__(self) -> None:
        numbers = (*self.scores, *self.logits)
        if self.method not in get_args(Method) or not all(map(_is_finite, numbers)):
            raise ValueError("it has an unknown method, or points that are not finite numbers")
        ascends = bool(np.all(np.diff(self.scores) > 0) and np.all(np.diff(self.logits) >= 0))
        if not 2 <= len(self.scores) == len(self.logits) or not ascends:
            raise ValueError("its points are no ascending line")

    def __call__(self, score: float) -> float:
        """Return the probability of a raw score."""
        if self.method == "platt":
            slope = (self.logits[-1] - self.logits[0]) / (self.scores[-1] - self.scores[0])
            return logistic(self.logits[0] + slope * (score - self.scores[0]))
        return logistic(float(np.interp(score, self.scores, self.logits)))

    def save(self, directory: Path, fingerprint: str) -> None:
        """Write ``probabilities.json``, as a whole or not at all.

        Args:
            directory: The directory of the model's lens.
            fingerprint: Identity of the model.

        Raises:
            StorageError: The directory cannot be written.
        """
        fitted = asdict(self)
        stored = {"format": _FORMAT, "fingerprint": fingerprint, "sha256": _digest(fitted), "fitted": fitted}
        replace_file(directory / _FILE, (json.dumps(stored, indent=2) + "\n").encode())


def fit_probability(scores: Sequence[float], relevant: Sequence[bool]) -> FittedProbability:
    """Fit a mapping from raw scores to probabilities.

    Below :data:`MANY` pairs this is Platt's method ("Probabilistic Outputs for Support Vector Machines", 1999),
    and isotonic regression from there on. Both fit to Platt's softened targets, so that no probability is 0 or 1.

    Args:
        scores: The raw score of each pair.
        relevant: Whether the text of the pair is relevant.

    Raises:
        ValueError: Relevant texts do not have the higher scores.
    """
    known, found = np.array(scores, dtype=np.float64), np.array(relevant, dtype=bool)
    positive = int(found.sum())
    negative = len(found) - positive
    targets = np.where(found, (positive + 1) / (positive + 2), 1 / (negative + 2))
    method: Method = "platt" if len(found) < MANY else "isotonic"
    points, logits = (_platt if method == "platt" else _isotonic)(known, targets)
    if not logits[-1] > logits[0]:
        raise ValueError(
            f"judgements say that texts with higher scores are not more relevant ({positive} of {len(found)} are "
            f"relevant): check that relevant texts are marked by True or a grade above 0"
        )
    return FittedProbability(method, tuple(points.tolist()), tuple(logits.tolist()), len(found), positive)


def find_probability(directory: Path | None, fingerprint: str, otherwise: Probability = logistic) -> Probability:
    """Return the mapping that was fitted for a model, or else its usual one.

    A mapping that cannot be used is left out with a warning.

    Args:
        directory: The directory of the model's lens; None for the one in grating's cache.
        fingerprint: Identity of the model.
        otherwise: The model's usual mapping.
    """
    try:
        path = (lens_directory(fingerprint) if directory is None else directory) / _FILE
    except StorageError as error:
        go_on_without_cache(error)
        return otherwise
    if not is_kept(path):
        return otherwise
    try:
        stored = read_json(path)
        fitted: dict[str, Any] = stored["fitted"]
        if stored["format"] != _FORMAT or stored["sha256"] != _digest(fitted):
            raise ValueError("it is of another format, or was changed")
        if stored["fingerprint"] != fingerprint:
            raise ValueError("it is for other weights, or another adapter or template")
        return FittedProbability(**fitted | {"scores": tuple(fitted["scores"]), "logits": tuple(fitted["logits"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("probabilities are not those that were fitted, because %s cannot be used: %r", path, error)
        return otherwise


class Judged(NamedTuple):
    """Here are pairs of query and text, and whether the text of each is relevant."""

    pairs: list[tuple[str, str]]
    relevant: list[bool]


def checked_judgements(judgements: Iterable[tuple[str, str, Any]]) -> Judged:
    """Return judgements that can be fitted to.

    Args:
        judgements: Triples of query, text, and True, False or a grade, which is relevant above 0.

    Raises:
        ValueError: A judgement is none; the message names its index. Or there are too few of either kind.
    """
    found = Judged([], [])
    for index, one in enumerate(
        elements("judgements", judgements, "a list of (query, text, relevant)", values="{name}.values()")
    ):
        if isinstance(one, str) or not hasattr(one, "__len__") or len(one) != 3:
            raise ValueError(f"judgements[{index}]={one!r} must be (query, text, relevant)")
        query, text, grade = one
        is_grade = isinstance(grade, bool | np.bool_) or (isinstance(grade, Real) and isfinite(grade))
        if not is_grade:
            raise ValueError(f"judgements[{index}] has {grade!r} as its judgement: write True, False or a grade")
        found.pairs.append((query, text))
        found.relevant.append(bool(grade > 0))
    positive, negative = sum(found.relevant), len(found.pairs) - sum(found.relevant)
    if min(positive, negative) < FEWEST:
        raise ValueError(
            f"judgements has {positive} relevant texts and {negative} others: give {FEWEST} of each, or more"
        )
    return found


def _platt(scores: NDArray[np.float64], targets: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return two points of the line that fits best, by the likelihood of the targets."""
    from sklearn.linear_model import LogisticRegression  # slow to import

    centre, spread = scores.mean(), scores.std() or 1.0
    features = np.tile((scores - centre) / spread, 2)[:, None]
    labels = np.repeat((1, 0), len(scores))
    line = LogisticRegression(C=1e6).fit(features, labels, sample_weight=np.concatenate((targets, 1 - targets)))
    points = np.array([-1.0, 1.0])
    return centre + spread * points, line.decision_function(points[:, None])


def _isotonic(scores: NDArray[np.float64], targets: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the points between which the best function that does not fall goes straight."""
    from sklearn.isotonic import IsotonicRegression  # slow to import

    found = IsotonicRegression().fit(scores, targets)
    points, probabilities = found.X_thresholds_, found.y_thresholds_
    return points, np.log(probabilities / (1 - probabilities))


def _digest(fitted: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fitted, sort_keys=True).encode()).hexdigest()


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and isfinite(value)
