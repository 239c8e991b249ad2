"""The published policy clusters the provisional scores, and decides for every cluster but the boundary one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from grating_core.pruning.policy import Route


@dataclass(frozen=True)
class ClusterPolicy:
    """This is progressive cluster pruning (GRATING, arXiv 2510.15620; PRISM, EuroSys '26).

    When the scores have spread far enough, measured by their coefficient of variation, they are clustered with
    k-means. The cluster that holds the K-th ranked candidate is the boundary cluster and is deferred; clusters
    above it are selected, clusters below it dropped.

    The defaults are a middle course between saving and losing on the collections of ``benchmarks/pruning.py``.
    What a threshold costs differs by model and corpus.

    Attributes:
        dispersion_threshold: Coefficient of variation, |standard deviation / mean|, above which the scores are
            clustered. A higher threshold prunes later. Infinity never prunes.
        clusters: Number of clusters, the k of k-means.

    Raises:
        ValueError: ``dispersion_threshold`` is negative or not a number, or ``clusters`` is below 2.
    """

    dispersion_threshold: float = 2.0
    clusters: int = 2

    def __post_init__(self) -> None:
        if not self.dispersion_threshold >= 0:
            raise ValueError(f"dispersion_threshold={self.dispersion_threshold} must be 0 or more")
        if self.clusters < 2:
            raise ValueError(f"clusters={self.clusters} must be 2 or more: a single one decides nothing")

    def route(self, layer: int, scores: NDArray[np.float64], top_k: int) -> Sequence[Route]:
        """Select the clusters above the one that holds the ``top_k``-th score, drop those below it."""
        if not dispersion(scores) > self.dispersion_threshold:
            return [Route.DEFERRED] * len(scores)
        labels = cluster_scores(scores, self.clusters)
        boundary = labels[np.argsort(-scores, kind="stable")[top_k - 1]]
        return [
            Route.SELECTED if label > boundary else Route.DROPPED if label < boundary else Route.DEFERRED
            for label in labels
        ]


def dispersion(scores: NDArray[np.float64]) -> float:
    """Return the coefficient of variation: 0 when all scores are equal, infinity when only their mean is 0."""
    # Before the mean is looked at: equal scores may have a standard deviation of one rounding error.
    if np.ptp(scores) == 0:
        return 0.0
    scaled = scores / np.abs(scores).max()  # so that squares neither overflow nor vanish
    mean = abs(float(scaled.mean()))
    return float(scaled.std()) / mean if mean > 0 else float("inf")


def cluster_scores(scores: NDArray[np.float64], clusters: int) -> NDArray[np.intp]:
    """Return the k-means cluster of each score, numbered from the lowest scores to the highest."""
    from sklearn.cluster import KMeans  # slow to import

    # Sorted, and started from quantiles: the same scores give the same clusters in every order of the documents.
    # Differences below a billionth of the range are rounding, which k-means itself cannot tell apart.
    scaled = np.round((scores - scores.min()) / np.ptp(scores), 9)
    points, weights = np.unique(scaled, return_counts=True)
    count = min(clusters, len(points))
    start = np.quantile(points, (np.arange(count) + 0.5) / count)[:, None]
    fitted = KMeans(n_clusters=count, init=start, n_init=1).fit(points[:, None], sample_weight=weights)
    rank = np.argsort(np.argsort(fitted.cluster_centers_[:, 0], kind="stable"))
    labels: NDArray[np.intp] = rank[fitted.labels_][np.searchsorted(points, scaled)]
    return labels
