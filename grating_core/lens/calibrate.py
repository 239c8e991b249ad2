"""Calibration: fit a lens to a model's own scores, and find the margins with which it can be trusted.

No judgements are needed: the model's final score is what the lens estimates. Requests are made from the user's own
texts, computed once without pruning, and divided: the lens is fitted on some, the margins come from the others.
"""

from __future__ import annotations

import random
import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge
from torch import Tensor
from tqdm import tqdm

from grating_core.files.places import cache_directory
from grating_core.files.writing import storing, temporary_file
from grating_core.lens.features import Features, LayerMap, Lens, Reader, Sequences
from grating_core.lens.store import CalibratedLens, Summary
from grating_core.pruning import Margins
from grating_core.pruning.conformal import Requests, calibrate_margins, simulate

_STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0)  # of the ridge, for standardised features
_FITTED = 0.6  # the part of the requests that the lens is fitted on
_VALIDATED = 5  # one in so many of these says which strength is best
_QUERY_WORDS = (4, 24)
FEWEST_REQUESTS = 20

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Request:
    """A query and the texts to rank for it."""

    query: str
    documents: list[str]


class Recorder:
    """Takes the place of a lens while a request is computed, and keeps what a lens would look at.

    Args:
        depth: Number of layers of the model.
        pooling: The token that its head reads.
    """

    def __init__(self, depth: int, pooling: str) -> None:
        self._pooling = pooling
        self.features: list[list[Tensor]] = [[] for _ in range(depth)]
        """For each layer from 0 float32 ``[N, F]``, in parts."""

    def reader(self, number: int, prefix: int) -> Reader:
        """See :meth:`Provisional.reader`; the scores are all zero."""
        features = Features(number, len(self.features), prefix, self._pooling)

        def record(hidden: Tensor, sequences: Sequences) -> Tensor:
            found = features(hidden, sequences)
            self.features[number].append(found.cpu())
            return found.new_zeros(len(found))

        return record


Run = Callable[[Request, Recorder], tuple[Floats, NDArray[np.int64]]]
"""Computes a request to the end; gives final scores ``[N]`` and tokens ``[N]``."""


@dataclass
class Recording:
    """What a lens would have looked at in some requests, and what came of them.

    Attributes:
        scores: Final scores of each request, float32 ``[N]``.
        tokens: Tokens of its candidates, int64 ``[N]``.
        features: For each layer from 0 a file with float32 ``[R · N, F]``. The files have no names and are gone
            with the recording. What they hold is derived from the texts: only their owner may read them.
        expected: Requests that it will hold, so that room for them is taken with the first.
    """

    scores: list[Floats] = field(default_factory=list)
    tokens: list[NDArray[np.int64]] = field(default_factory=list)
    features: list[Any] = field(default_factory=list)
    expected: int = 1

    def __len__(self) -> int:
        return len(self.scores)

    def add(self, recorder: Recorder, scores: Floats, tokens: NDArray[np.int64]) -> None:
        """Keep one more request, with as many candidates as those before it; raises ``StorageError``."""
        layers = [torch.cat(parts).numpy().tobytes() for parts in recorder.features]
        sizes = [self.expected * len(layer) for layer in layers]
        # Not where temporary files usually go: that may be memory.
        directory = cache_directory()
        with storing(directory / "calibration", sum(sizes)):
            if not self.features:
                for size in sizes:
                    self.features.append(temporary_file(directory, size))
                    weakref.finalize(self, self.features[-1].close)
            for file, layer in zip(self.features, layers, strict=True):
                file.write(layer)
        self.scores.append(scores)
        self.tokens.append(tokens)

    def layer(self, number: int) -> Floats:
        """float32 ``[R, N, F]``: the features after a layer."""
        self.features[number].flush()
        shape = (len(self.scores), len(self.scores[0]), -1)
        return np.memmap(self.features[number], dtype=np.float32, mode="r").reshape(shape)


def make_requests(
    documents: Sequence[str],
    queries: Sequence[str] | None,
    *,
    candidates: int,
    count: int,
    seed: int = 0,
    fewest: int = FEWEST_REQUESTS,
) -> list[Request]:
    """Requests like those that will come: queries, and the documents that have most words in common with each.

    Args:
        documents: The texts.
        queries: Real queries; None to take the title or leading sentence of documents, which then are not among
            the candidates themselves.
        candidates: How many documents each request gets.
        count: The most requests that are made.
        seed: Of the choice of queries or documents.
        fewest: How many queries there must be to choose from.

    Raises:
        ValueError: There are too few documents for that many candidates, or too few queries.
    """
    texts = list(documents)
    if len(texts) <= candidates:
        raise ValueError(f"documents has {len(texts)} texts, which is too few for requests of {candidates}")
    chance = random.Random(seed)
    asked = _leading_sentences(texts) if queries is None else [(query, None) for query in queries if query.strip()]
    if len(asked) < fewest:
        purpose = " to fit a lens" if fewest == FEWEST_REQUESTS else ""
        raise ValueError(
            f"there are {len(asked)} queries, which is too few{purpose}: pass {fewest} or more, or "
            f"documents that begin with a title or sentence, of which they can be made"
        )
    chosen = chance.sample(asked, min(count, len(asked)))
    index = TfidfVectorizer(sublinear_tf=True)
    known = index.fit_transform(texts)
    requests = []
    for query, source in chosen:
        likeness = (known @ index.transform([query]).T).toarray()[:, 0]
        if source is not None:
            likeness[source] = -1
        best = np.argsort(-likeness, kind="stable")[:candidates]
        requests.append(Request(query, [texts[i] for i in best]))
    return requests


def _leading_sentences(texts: Sequence[str]) -> list[tuple[str, int | None]]:
    """The beginning of each text that has one which could be a query, and the number of that text."""
    fewest, most = _QUERY_WORDS
    found: list[tuple[str, int | None]] = []
    for number, text in enumerate(texts):
        words = re.split(r"(?<=[.?!])\s|\n", text.strip(), maxsplit=1)[0].split()
        if len(words) >= fewest:
            found.append((" ".join(words[:most]), number))
    return found


def record(
    run: Run, requests: Sequence[Request], *, depth: int, pooling: str, show_progress: bool = False
) -> Recording:
    """Compute requests without pruning.

    Args:
        run: Computes one.
        requests: All with the same number of candidates.
        depth: Number of layers of the model.
        pooling: The token that its head reads.
        show_progress: Show a progress bar on standard error.

    Raises:
        StorageError: There is no room in grating's cache for what is recorded.
    """
    recording = Recording(expected=len(requests))
    for request in tqdm(requests, "Calibrating", unit="request", disable=not show_progress):
        recorder = Recorder(depth, pooling)
        recording.add(recorder, *run(request, recorder))
    return recording


def fit(
    recordings: Sequence[Recording],
    *,
    pooling: str,
    fingerprint: str,
    top_k: int,
    target: float,
    show_progress: bool = False,
) -> CalibratedLens:
    """Fit a lens and find its margins, on requests that it was not fitted on.

    Of a single corpus some requests are left for the margins. Of several, each corpus is estimated by a lens that
    was fitted on the others only: the margins are then those for a corpus that the lens has not seen. The lens
    that is returned has seen them all.

    Args:
        recordings: One for each corpus.
        pooling: The token that the model's head reads.
        fingerprint: Of the model's weights.
        top_k: K of the summary.
        target: Promise of the summary.
        show_progress: Show progress bars on standard error.
    """
    depth = len(recordings[0].features)
    cut = round(_FITTED * len(recordings[0])) if len(recordings) == 1 else None
    maps, spread = [], []
    estimates: list[list[Floats]] = [[] for _ in recordings]
    for number in tqdm(range(depth), "Lens", unit="layer", disable=not show_progress):
        features = [recording.layer(number)[:cut] for recording in recordings]
        scores = [np.stack(recording.scores[:cut]) for recording in recordings]
        strength, error = choose_strength(features, scores)
        layer = fit_layer(features, scores, strength)
        maps.append(layer)
        spread.append(error)
        for index, recording in enumerate(recordings):
            apart = layer
            if cut is None:
                others = [i for i in range(len(recordings)) if i != index]
                apart = fit_layer([features[i] for i in others], [scores[i] for i in others], strength)
            estimates[index].append(recording.layer(number)[cut or 0 :] @ apart.weight.numpy())
    groups = [
        Requests(
            np.stack(found, axis=2).astype(np.float64),
            np.stack(recording.scores[cut or 0 :]).astype(np.float64),
            np.stack(recording.tokens[cut or 0 :]),
        )
        for recording, found in zip(recordings, estimates, strict=True)
    ]
    margins = calibrate_margins(groups, np.array(spread), show_progress=show_progress)
    fitted = sum(map(len, recordings)) if cut is None else cut
    summary = _summarise(groups, margins, fitted=fitted, top_k=top_k, target=target)
    return CalibratedLens(Lens(maps, pooling), margins, fingerprint, summary)


def _summarise(groups: Sequence[Requests], margins: Margins, *, fitted: int, top_k: int, target: float) -> Summary:
    candidates = max(requests.scores.shape[1] for requests in groups)
    policy = margins.policy(candidates, top_k, target=target, guarantee="share", exact=True)
    outcomes = [simulate(requests, top_k, drop=np.array(policy.drop), select=None) for requests in groups]
    gammas = [
        [
            np.nan_to_num(gamma(estimates, scores))  # a request whose scores are all equal has none
            for requests in groups
            for estimates, scores in zip(requests.estimates[:, :, number], requests.scores, strict=True)
        ]
        for number in range(len(margins.drop))
    ]
    return Summary(
        fitted=fitted,
        measured=sum(map(len, groups)),
        candidates=candidates,
        top_k=top_k,
        target=target,
        agreement=float(1 - np.concatenate([outcome.lost for outcome in outcomes]).mean()),
        compute_share=float(np.concatenate([outcome.compute_share for outcome in outcomes]).mean()),
        gammas=tuple(float(np.mean(found)) for found in gammas),
    )


def choose_strength(features: Sequence[Floats], scores: Sequence[Floats]) -> tuple[float, float]:
    """The strength of the ridge with the smallest error on requests that are left out, and that error.

    Args:
        features: ``[R, N, F]`` of each corpus.
        scores: ``[R, N]`` of each corpus.
    """
    inputs, wanted, _ = _prepared(features, scores)
    left_out = np.concatenate([np.repeat(np.arange(len(one)) % _VALIDATED == 0, one.shape[1]) for one in scores])
    errors = {}
    for strength in _STRENGTHS:
        weight = _ridge(inputs[~left_out], wanted[~left_out], strength)
        errors[strength] = float(np.sqrt(np.mean((inputs[left_out] @ weight - wanted[left_out]) ** 2)))
    best = min(errors, key=errors.__getitem__)
    return best, errors[best]


def fit_layer(features: Sequence[Floats], scores: Sequence[Floats], strength: float) -> LayerMap:
    """The map of one layer; arguments as for :func:`choose_strength`, and the strength it chose."""
    inputs, wanted, scale = _prepared(features, scores)
    weight = _ridge(inputs, wanted, strength) / scale
    mean = np.mean([one.mean((0, 1)) for one in features], axis=0)
    bias = np.mean([one.mean() for one in scores]) - mean @ weight
    return LayerMap(torch.from_numpy(weight.astype(np.float32)), torch.tensor(float(bias)))


def _prepared(features: Sequence[Floats], scores: Sequence[Floats]) -> tuple[Floats, Floats, Floats]:
    """Features ``[n, F]``, centred by request and standardised; scores ``[n]``, centred; the features' scale."""
    inputs = np.concatenate([_centred(one).reshape(-1, one.shape[-1]) for one in features])
    wanted = np.concatenate([_centred(one).reshape(-1) for one in scores])
    scale = inputs.std(0) + np.float32(1e-6)
    inputs /= scale
    return inputs, wanted, scale


def _ridge(inputs: Floats, wanted: Floats, strength: float) -> Floats:
    fitted = Ridge(alpha=strength * len(inputs), fit_intercept=False, solver="cholesky").fit(inputs, wanted)
    return np.asarray(fitted.coef_, dtype=np.float32)


def _centred(values: Floats) -> Floats:
    """Without the mean of each request: only what differs within one decides its ranking."""
    return np.asarray(values - values.mean(1, keepdims=True))


def gamma(estimates: NDArray[Any], scores: NDArray[Any], pairs: NDArray[np.bool_] | None = None) -> float:
    """Goodman and Kruskal's γ between two readings of the same candidates.

    Args:
        estimates: ``[N]``.
        scores: ``[N]``.
        pairs: bool ``[N, N]``, symmetric: the pairs that count; None for all.

    Returns:
        (concordant − discordant) / (concordant + discordant) pairs; NaN if there are none.
    """
    order = np.sign(estimates[:, None] - estimates) * np.sign(scores[:, None] - scores)
    if pairs is not None:
        order = order[pairs]
    counted = np.abs(order).sum()
    return float(order.sum() / counted) if counted else float("nan")
