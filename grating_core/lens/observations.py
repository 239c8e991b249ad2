"""Observers keep the features of requests that are computed to the end, in files until a lens is fitted."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from grating_core.files.places import cache_directory, storing
from grating_core.files.writing import temporary_file
from grating_core.lens.features import Features, Part, Reader
from grating_core.models.cross_encoder import Shape
from grating_core.requests import Request

Floats = NDArray[np.float32]

_ROWS = 8192  # candidates whose features are in memory at once


class Observer:
    """An observer takes the place of a lens while a request is computed, and keeps the features.

    Args:
        depth: Number of layers of the model.
        pooling: The token that the model's head reads.
    """

    def __init__(self, depth: int, pooling: str) -> None:
        self._pooling = pooling
        self.features: list[list[Tensor]] = [[] for _ in range(depth)]
        """Parts of the features after each layer from 0, together float32 ``[N, F]``."""

    def reader(self, number: int) -> Reader:
        """See :meth:`Provisional.reader`; the scores are all zero."""
        return _Observed(Features(number, len(self.features), self._pooling), self.features[number])


class _Observed:
    """This class keeps what a lens would look at after one layer; see :class:`~grating_core.lens.features.Reader`.

    Args:
        features: The features of the request.
        found: The list that parts of the features go to, float32 ``[N, F]`` together.
    """

    def __init__(self, features: Features, found: list[Tensor]) -> None:
        self._features = features
        self._found = found
        self._device: torch.device | None = None

    def see(self, states: Tensor, parts: Sequence[Part]) -> None:
        """See :meth:`Reader.see`."""
        self._found.append(self._features.see(states, parts).cpu())
        self._device = states.device

    def scores(self) -> Tensor:
        """Return zeros, float32 ``[N]``."""
        return torch.zeros(sum(map(len, self._found)), device=self._device)


Observe = Callable[[Request, Observer], tuple[Floats, NDArray[np.int64]]]
"""A function that computes a request to the end; see :meth:`grating_core.engine.scorer.Scorer.observe`."""


@dataclass
class Observations:
    """This class keeps the features and final scores of requests.

    Attributes:
        scores: Final scores of each request, float32 ``[N]``.
        tokens: Numbers of tokens of each request's candidates, int64 ``[N]``.
        features: A file for each layer from 0, with ``[n, F]`` of all n candidates. The files have no names and
            are gone with this object. Only their owner may read them, because the features depend on the texts.
        expected: Number of candidates that there will be. Room for all is taken with the first request.
    """

    scores: list[Floats] = field(default_factory=list)
    tokens: list[NDArray[np.int64]] = field(default_factory=list)
    features: list[Any] = field(default_factory=list)
    expected: int = 1
    dtype: type[np.floating[Any]] = np.float32

    def __len__(self) -> int:
        return len(self.scores)

    def add(self, observer: Observer, scores: Floats, tokens: NDArray[np.int64]) -> None:
        """Keep one more request; raise ``StorageError`` without room."""
        layers = [torch.cat(parts).numpy().astype(self.dtype) for parts in observer.features]
        sizes = [self.expected * layer.itemsize * layer.shape[1] for layer in layers]
        # The usual place of temporary files may be in memory, so these go elsewhere.
        directory = cache_directory()
        with storing(directory / "calibration", sum(sizes)):
            if not self.features:
                for size in sizes:
                    self.features.append(temporary_file(directory, size))
                    weakref.finalize(self, self.features[-1].close)
            for file, layer in zip(self.features, layers, strict=True):
                file.write(layer.tobytes())
        self.scores.append(scores)
        self.tokens.append(tokens)

    def layer(self, number: int) -> NDArray[Any]:
        """Return the features of all candidates after a layer, ``[n, F]``."""
        self.features[number].flush()
        candidates = sum(map(len, self.scores))
        return np.memmap(self.features[number], dtype=self.dtype, mode="r").reshape(candidates, -1)

    def estimates(self, number: int, weight: Floats) -> list[Floats]:
        """Return a map's estimates after a layer, float32 ``[N]`` for each request; no bias is added."""
        ends = np.cumsum([len(found) for found in self.scores])
        layer = self.layer(number)
        starts = range(0, len(layer), _ROWS)
        found = np.concatenate([layer[start : start + _ROWS].astype(np.float32) @ weight for start in starts])
        return np.split(found, ends[:-1])


def observe_all(
    observe: Observe, requests: Sequence[Request], shape: Shape, *, show_progress: bool = False
) -> Observations:
    """Compute requests without pruning, and keep their features.

    Args:
        observe: Function that computes one request.
        requests: The requests.
        shape: Shape of the model.
        show_progress: Whether to show a progress bar on standard error.

    Raises:
        StorageError: There is no room in grating's cache.
    """
    observations = Observations(expected=sum(len(request.documents) for request in requests))
    for request in tqdm(requests, "Calibrating", unit="request", disable=not show_progress):
        observer = Observer(shape.depth, shape.pooling)
        observations.add(observer, *observe(request, observer))
    return observations
