"""Highlights are the sentences of a document that carried its score, found in the pass that scores it.

Nothing is trained for it. Two numbers tell what a sentence is worth. In the embeddings each token of the query
looks for tokens of the document that are like it: the *loss* of a sentence is how much of that likeness the rest
of the document lacks. A token of the query counts by the attention that the scoring token pays to it after three
quarters of the layers. In the last layer a copy of the scoring token for each sentence attends to no other
sentence: the copy's score says how far its sentence goes *alone*. ``benchmarks/highlights.py`` compares the best
sentence by both with the one whose removal costs the score most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize, pad

from grating_core.engine.ragged import Encoded, Slice, filled
from grating_core.kernels.operands import Seen, Span
from grating_core.layers.sending import integers, sent
from grating_core.layers.spec import LayerSpec
from grating_core.models.cross_encoder import CrossEncoder
from grating_core.models.family import ModelSpec
from grating_core.models.layered import Layer
from grating_core.results import Highlight
from grating_core.text.pairs import Segments, Template, TokenisedPair
from grating_core.text.sentences import sentences

Floats = NDArray[np.float64]

_LOSS = 1.5  # the weight of the loss beside the score alone; both are standardised within the document
_SHOWN = 0.5  # the least worth of a sentence that is shown, as a share of the best sentence's
_LIKE = 0.06  # the difference of cosines that makes e times the likeness
_CHARACTERS = 8  # characters of a document for each token of the window, in which sentences are looked for
_BLOCK = 1024  # tokens of a document that are embedded at once
_LEAST = 1e-30  # likeness, which has a logarithm


class Divided(NamedTuple):
    """This class says how a document is divided into sentences, which all have a token.

    Attributes:
        places: The first character of each sentence in the text, and the one behind its last.
        ends: The number of the document's tokens before the end of each sentence, rising.
    """

    places: Sequence[tuple[int, int]]
    ends: Sequence[int]

    def owners(self, tokens: int) -> Tensor:
        """Return the number of the sentence of each of a document's tokens, int64; that of none is behind all."""
        return torch.from_numpy(np.searchsorted(self.ends, np.arange(tokens), side="right"))


Divide = Callable[[Sequence[int], Sequence[int]], list[Divided]]
"""Divides the documents of some candidates, of which so many tokens were read each."""


class Highlighter:
    """A highlighter follows the sentences of one request's documents through the layers.

    Args:
        spec: The model's spec.
        divide: Function that divides documents.
    """

    def __init__(self, spec: ModelSpec, divide: Divide) -> None:
        self._divide = divide
        self._pooling = spec.pooling
        self._last = spec.depth
        self._asks = spec.depth - max(1, spec.depth // 4) + 1  # the layer whose attention to the query counts
        # A mean has no scoring token, and relative positions would see gaps between what is left.
        relative = any(layer.relative is not None for layer in spec.layers)
        self._follows = spec.pooling != "mean" and not relative
        self._documents: dict[int, Divided] = {}
        self.attention: dict[int, Tensor] = {}
        """The attention of each followed candidate's scoring token to the tokens of the query, ``[Q]``."""
        self._copies: dict[int, Tensor] = {}  # of the scoring token, one for each sentence, after the last layer

    @classmethod
    def of(cls, spec: ModelSpec, template: Template, documents: Sequence[str]) -> Highlighter:
        """Return the highlighter of some documents, whose template makes their tokens.

        Raises:
            ValueError: The template divides long documents into windows.
        """
        if template.long_documents == "windows":
            raise ValueError(
                "highlights=True: sentences are followed in one window only; load the reranker with "
                "long_documents='truncate', or leave highlights out"
            )

        def divide(candidates: Sequence[int], tokens: Sequence[int]) -> list[Divided]:
            texts = [documents[candidate][: _CHARACTERS * template.window] for candidate in candidates]
            places = [sentences(text) for text in texts]
            ends = template.count_before(texts, [[stop for _, stop in some] for some in places])
            return [_divided(*one) for one in zip(texts, places, ends, tokens, strict=True)]

        return cls(spec, divide)

    def wants(self, number: int) -> bool:
        """Tell whether a layer is to be seen."""
        return self._follows and number in (self._asks, self._last)

    def see(
        self, number: int, layer: Layer, part: Slice, request: int, states: Tensor, query: Tensor, seen: Seen
    ) -> None:
        """See what the scoring tokens of a request's documents do in a layer.

        Args:
            number: The number of the layer.
            layer: The layer.
            part: A slice.
            request: The number of the request.
            states: States before the layer of the tokens whose output is asked for, ``[T, D]``.
            query: Their queries, ``[T, heads, head size]``.
            seen: The keys and values that they see.
        """
        scoring = list(self._scoring(part, request))
        if number == self._asks:
            for one in scoring:
                key, _ = seen.of(one.span)
                weights = _weights(layer.spec, one, query[one.row], key)
                self.attention[one.candidate] = weights[0, ..., slice(*one.segments.query)].mean((0, 1))
        if number == self._last and scoring:
            self._read([(one.candidate, one.segments) for one in scoring])
            attended = [self._alone(layer.spec, one, query[one.row], *seen.of(one.span)) for one in scoring]
            counts = [len(some) for some in attended]
            rows = torch.from_numpy(np.repeat([one.row for one in scoring], counts))
            copies = _finished(layer, states[sent(rows, states.device)], torch.cat(attended))
            for one, own in zip(scoring, torch.split(copies, counts), strict=True):
                self._copies[one.candidate] = own

    def _scoring(self, part: Slice, request: int) -> Iterator[_Scoring]:
        """Yield the scoring tokens of a request among those of a slice that are asked for."""
        for one, span in zip(part.asked, part.spans, strict=True):
            piece = one.piece
            own = (0 if self._pooling == "first" else piece.length - 1) - one.start
            if piece.request == request and piece.segments is not None and 0 <= own < one.length:
                assert piece.candidate is not None
                place = piece.before + one.start + own
                yield _Scoring(piece.candidate, piece.segments, one.rows.start + own, place, span)

    def _read(self, found: Sequence[tuple[int, Segments]]) -> None:
        """Divide the documents of some candidates that are not divided yet."""
        new = {one: segments.document for one, segments in found if one not in self._documents}
        if new:
            divided = self._divide(list(new), [stop - start for start, stop in new.values()])
            self._documents |= zip(new, divided, strict=True)

    def _alone(self, spec: LayerSpec, one: _Scoring, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return what the copies of a scoring token attend to, ``[S, heads, head size]``."""
        document = self._documents[one.candidate]
        start, stop = one.segments.document
        owners = torch.full((len(key),), -1)
        owners[start:stop] = document.owners(stop - start)
        own = (owners < 0) | (owners == torch.arange(len(document.ends))[:, None])
        weights = _weights(spec, one, query, key, sent(own, key.device))
        attended = torch.einsum("skgm,mkd->skgd", weights, value.float())
        return attended.reshape(-1, *query.shape).to(query.dtype)

    def alone(self, model: CrossEncoder, candidates: Sequence[int]) -> list[Floats | None]:
        """Return what each sentence of some candidates scores alone, ``[S]``; None if a pass ended too early."""
        followed = [self._copies[candidate] for candidate in candidates if candidate in self._copies]
        if not followed:
            return [None] * len(candidates)
        scores = model.score(model.normed(torch.cat(followed).float()), model.depth).cpu().numpy()
        ends = np.cumsum([len(copies) for copies in followed])
        found = iter(np.split(scores.astype(np.float64), ends[:-1]))
        return [next(found) if candidate in self._copies else None for candidate in candidates]

    def found(
        self, model: CrossEncoder, candidates: Sequence[int], encoded: Encoded
    ) -> dict[int, tuple[Highlight, ...]]:
        """Return the highlights of some candidates, best first; none of a candidate without sentences.

        Args:
            model: The model.
            candidates: The numbers of the candidates.
            encoded: The tokens of all candidates.
        """
        pairs = [encoded[candidate][0] for candidate in candidates]
        self._read([(candidate, pair.segments) for candidate, pair in zip(candidates, pairs, strict=True)])
        highlights: dict[int, tuple[Highlight, ...]] = {}
        for candidate, pair, scores in zip(candidates, pairs, self.alone(model, candidates), strict=True):
            divided = self._documents[candidate]
            if not divided.places:
                highlights[candidate] = ()
                continue
            losses = _losses(model, pair, divided)
            attention = self.attention.get(candidate)
            lost = losses.mean(1) if attention is None else losses @ attention
            worth = _LOSS * _standardised(lost.cpu().numpy().astype(np.float64))
            if scores is not None:
                worth = worth + _standardised(scores)
            highlights[candidate] = _highlights(worth, divided.places)
        return highlights


class _Scoring(NamedTuple):
    """This class holds where a scoring token is: in its slice, and in its sequence."""

    candidate: int
    segments: Segments
    row: int
    place: int
    span: Span


def _divided(text: str, places: Sequence[tuple[int, int]], ends: Sequence[int], tokens: int) -> Divided:
    """Return the sentences of a text that have a token among the first ones, without white space before them."""
    stops = [min(end, tokens) for end in ends]
    kept = [number for number, stop in enumerate(stops) if stop > (stops[number - 1] if number else 0)]
    lengths = [len(text[slice(*places[number])].lstrip()) for number in kept]
    found = [(places[number][1] - length, places[number][1]) for number, length in zip(kept, lengths, strict=True)]
    return Divided(found, [stops[number] for number in kept])


def _weights(spec: LayerSpec, one: _Scoring, query: Tensor, key: Tensor, shown: Tensor | None = None) -> Tensor:
    """Return the attention of a token to the keys that are shown to each of its copies.

    Args:
        spec: The layer's spec.
        one: Where the token is.
        query: Its query, ``[heads, head size]``.
        key: The keys of its sequence, ``[M, key heads, head size]``.
        shown: Which keys each copy is shown, bool ``[S, M]``; None for one copy that is shown all.

    Returns:
        Weights, float32 ``[S, key heads, queries of each, M]``.
    """
    grouped = query.view(spec.key_heads, -1, spec.head_size).float()
    products = torch.einsum("kgd,mkd->kgm", grouped, key.float()) * spec.scaling
    if spec.softcap is not None:
        products = (products / spec.softcap).tanh() * spec.softcap
    if spec.window is not None and len(key) > spec.window:
        near = (torch.arange(len(key), device=key.device) - one.place).abs() < spec.window
        products = products.masked_fill(~near, -torch.inf)
    copies = products[None] if shown is None else products.masked_fill(~shown[:, None, None], -torch.inf)
    return copies.softmax(-1)


def _finished(layer: Layer, states: Tensor, attended: Tensor) -> Tensor:
    """Return states ``[N, D]`` after a layer, by what they attended to, ``[N, heads, head size]``."""
    count = len(states)
    if layer.fills:
        fill = filled(count) - count
        states, attended = pad(states, (0, 0, 0, fill)), pad(attended, (0, 0, 0, 0, 0, fill))
    output: Tensor = layer.steps.finished(layer.spec, layer.weights, states, attended, layer.mlp)
    return output[:count]


def _losses(model: CrossEncoder, pair: TokenisedPair, divided: Divided) -> Tensor:
    """Return what each token of the query loses of its likeness to a document without each sentence, ``[S, Q]``.

    The likeness of two tokens grows with the cosine of their embeddings so fast that the best ones make the sum.
    """
    (asked, end), (start, stop) = pair.segments.query, pair.segments.document
    owners = sent(divided.owners(stop - start), model.device)
    likeness = torch.zeros(len(divided.ends) + 1, end - asked, device=model.device)  # the last row: no sentence's
    for first in range(start, stop, _BLOCK):
        last = min(first + _BLOCK, stop)
        directions = normalize(_embedded(model, pair, [*range(asked, end), *range(first, last)]), dim=1)
        cosines = directions[end - asked :] @ directions[: end - asked].T
        likeness.index_add_(0, owners[first - start : last - start], ((cosines - 1) / _LIKE).exp_())
    rest = (1 - torch.eye(len(likeness), device=model.device)) @ likeness
    return (likeness.sum(0).clamp_min(_LEAST).log() - rest.clamp_min(_LEAST).log())[:-1]


def _embedded(model: CrossEncoder, pair: TokenisedPair, places: Sequence[int]) -> Tensor:
    """Return the embeddings of the tokens at some places of a pair, float32 ``[T, D]``."""
    states = torch.empty(len(places), model.width, dtype=model.dtype, device=model.device)
    ids, types = (integers(some[place] for place in places) for some in (pair.input_ids, pair.token_type_ids))
    model.embed(ids, types, integers(places), states)
    return states.float()


def _standardised(values: Floats) -> Floats:
    """Return values with a mean of 0 and a standard deviation of 1; zeros if all are equal."""
    spread = float(values.std())
    return (values - values.mean()) / spread if spread > 0 else np.zeros_like(values)


def _highlights(worth: Floats, places: Sequence[tuple[int, int]]) -> tuple[Highlight, ...]:
    """Return the best sentence, and those that are nearly as good, best first."""
    best = float(worth.max())
    shares = worth / best if best > 0 else np.ones_like(worth)
    order = [index for index in np.argsort(-shares, kind="stable").tolist() if shares[index] >= _SHOWN]
    return tuple(Highlight(places[index][0], places[index][1], float(shares[index])) for index in order)
