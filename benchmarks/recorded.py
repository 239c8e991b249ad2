"""Requests computed once, without pruning, with all that is needed to know what any policy would have done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor

from benchmarks.collections import Request
from benchmarks.worker import progress
from grating_core import Reranker
from grating_core.engine.head import HeadReader
from grating_core.engine.observing import layered
from grating_core.lens.features import Part, Reader
from grating_core.lens.observations import Observations, Observer
from grating_core.lens.store import CalibratedLens
from grating_core.models.cross_encoder import CrossEncoder
from grating_core.requests import Request as Asked

Array = NDArray[np.float64]

_BEST_MEAN = -5  # among the features of layer 0: the mean over query tokens of the best cosine


@dataclass(frozen=True)
class Recorded:
    """Some requests of one corpus, R of them with N candidates each, and what the full model made of them.

    Attributes:
        name: Name of the corpus.
        requests: R of them.
        recording: What a lens would look at, final scores and tokens.
        head: float64 ``[R, N, L + 1]``: the own head's scores after layers 0 to L. Layer 0, the token embeddings,
            says nothing to it: all zero.
        prefixes: int64 ``[R]``: tokens that all candidates of a request share, which are computed once.
    """

    name: str
    requests: list[Request]
    recording: Observations
    head: Array
    prefixes: NDArray[np.int64]

    @property
    def tokens(self) -> NDArray[np.int64]:
        """int64 ``[R, N]``: tokens of each candidate, without the shared prefix."""
        return np.stack(self.recording.tokens)

    @property
    def similarities(self) -> Array:
        """float64 ``[R, N]``: the mean over query tokens of the largest cosine with a document token embedding."""
        return self.recording.layer(0)[:, _BEST_MEAN].reshape(len(self.requests), -1).astype(np.float64)

    def estimates(self, calibrated: CalibratedLens) -> Array:
        """Return float64 ``[R, N, L + 1]``: a lens's estimates after layers 0 to L - 1, and the final scores."""
        found = [
            np.stack(self.recording.estimates(number, layer.weight.cpu().numpy())) + float(layer.bias)
            for number, layer in enumerate(calibrated.lens.maps)
        ]
        return np.stack([*found, self.head[:, :, -1]], axis=2).astype(np.float64)


class HeadObserver(Observer):
    """Records what a lens would look at, and reads every layer with the model's own head as well."""

    def __init__(self, model: CrossEncoder) -> None:
        super().__init__(model.depth, model.spec.pooling)
        self._model = model
        self.scores: list[Tensor] = []
        """For each layer from 1 to the last but one float32 ``[N]``."""
        self.prefix = 0
        """Tokens that all candidates share."""

    def reader(self, number: int) -> Reader:
        """See :meth:`Observer.reader`; the scores are those of the head, which is blind before the first layer."""
        observed = super().reader(number)
        return _Both(self, observed, HeadReader(self._model, number)) if number else observed


class _Both:
    """Lets an observer and the head see the same."""

    def __init__(self, observer: HeadObserver, observed: Reader, head: Reader) -> None:
        self._observer = observer
        self._observed = observed
        self._head = head

    def see(self, states: Tensor, parts: Sequence[Part]) -> None:
        """See :meth:`Reader.see`."""
        self._observer.prefix = parts[-1].piece.before
        self._observed.see(states, parts)
        self._head.see(states, parts)

    def scores(self) -> Tensor:
        """See :meth:`Reader.scores`."""
        self._observer.scores.append(self._head.scores().float().cpu())
        return self._observer.scores[-1]


def record_corpus(reranker: Reranker, name: str, requests: list[Request], candidates: int) -> Recorded:
    """Compute the requests of a corpus.

    Args:
        reranker: Computes them; its policy does not matter.
        name: Name of the corpus.
        requests: Those with fewer candidates than others are left out.
        candidates: How many they should have.
    """
    full = [request for request in requests if len(request.documents) == candidates]
    scorer = layered(reranker.scorer)
    recording, heads, prefixes = Observations(expected=len(full) * candidates), [], []
    for request in track(full, f"{name}: computing without pruning", console=progress):
        observer = HeadObserver(scorer.model)
        scores, tokens = scorer.observe(Asked(request.query, request.documents), observer)
        recording.add(observer, scores, tokens)
        between = [found.numpy() for found in observer.scores]
        prefixes.append(observer.prefix)
        heads.append(np.stack([np.zeros_like(scores), *between, scores], axis=1))
    return Recorded(name, full, recording, np.stack(heads).astype(np.float64), np.array(prefixes))
