"""Highlights are the sentences of a document that carried its score, found in the pass that scores it.

Nothing is trained for it. Two numbers tell what a sentence is worth. In the embeddings each token of the query
looks for tokens of the document that are like it: the *loss* of a sentence is how much of that likeness the rest
of the document lacks. A token of the query counts by the attention that the scoring token pays to it after three
quarters of the layers, the document left out. In the last layer a copy of the scoring token for each sentence sees
no other sentence: the copy's score says how far its sentence goes *alone*. ``benchmarks/highlights.py`` compares
the best sentence by both with the one whose removal costs the score most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize, pad

from grating_core.engine.ragged import Encoded, Slice, filled
from grating_core.kernels.operands import Seen, Span
from grating_core.layers.attention import ragged_attention
from grating_core.layers.sending import integers, numbers_of, sent
from grating_core.layers.spec import LayerSpec
from grating_core.models.cross_encoder import CrossEncoder
from grating_core.models.family import ModelSpec
from grating_core.models.layered import Layer
from grating_core.results import Highlight
from grating_core.text.pairs import Segments, Template, TokenisedPair
from grating_core.text.sentences import Divided, divided, sentences

Floats = NDArray[np.float64]

_LOSS = 1.5  # the weight of the loss beside the score alone; both are standardised within the document
_SHOWN = 0.5  # the least worth of a sentence that is shown, as a share of the best sentence's
_LIKE = 0.06  # the difference of cosines that makes e times the likeness
_CHARACTERS = 8  # characters of a document for each token of the window, in which sentences are looked for
_BLOCK = 1024  # tokens of a document that are embedded at once
_TOGETHER = 8  # documents whose keys are copied at once
_LEAST = 1e-30  # likeness, which has a logarithm


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
            return [divided(*one) for one in zip(texts, places, ends, tokens, strict=True)]

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
        if number == self._last:
            self._read([(one.candidate, one.segments) for one in scoring])
        for first in range(0, len(scoring), _TOGETHER):
            some = scoring[first : first + _TOGETHER]
            if number == self._asks:
                self._ask(layer.spec, some, query, seen)
            if number == self._last and (some := [one for one in some if self._documents[one.candidate].ends]):
                self._follow(layer, some, states, query, seen)

    def _follow(
        self, layer: Layer, scoring: Sequence[_Scoring], states: Tensor, query: Tensor, seen: Seen
    ) -> None:
        """Take the copies of scoring tokens through the last layer."""
        spans, rows, keys = self._copied(scoring, layer.spec.window)
        rows, keys = sent(rows, states.device), sent(keys, states.device)
        shown = Seen(seen.key.index_select(0, keys), seen.value.index_select(0, keys), seen.shared)
        every = replace(layer.spec, causal=False, window=None)  # the spans have only what a copy is shown
        copies = _finished(layer, states[rows], ragged_attention(every, query[rows], shown, spans))
        counts = [len(self._documents[one.candidate].ends) for one in scoring]
        self._copies |= zip([one.candidate for one in scoring], torch.split(copies, counts), strict=True)

    def _ask(self, spec: LayerSpec, scoring: Sequence[_Scoring], query: Tensor, seen: Seen) -> None:
        """Note the attention of scoring tokens to the query, among all tokens that are not the document's."""
        shared = scoring[0].span.shared
        others = [one.others() for one in scoring]
        places = np.full((len(scoring), shared + max(map(len, others))), -1)
        places[:, :shared] = np.arange(shared)
        for own, found in zip(places, others, strict=True):
            own[shared : shared + len(found)] = found
        shown = places >= 0
        if spec.window is not None:
            shown &= abs(places - np.array([[one.place] for one in scoring])) < spec.window
        rows = np.maximum(places[:, shared:], shared) + np.array([[one.first] for one in scoring])
        key = seen.key[sent(torch.from_numpy(rows), query.device)]
        if seen.shared is not None and shared:
            key = torch.cat((seen.shared[0].expand(len(key), -1, -1, -1), key), dim=1)
        asking = query[sent(integers(one.row for one in scoring), query.device)]
        grouped = asking.view(len(key), spec.key_heads, -1, spec.head_size).float()
        products = torch.einsum("nkgd,nmkd->nkgm", grouped, key.float()) * spec.scaling
        if spec.softcap is not None:
            products = (products / spec.softcap).tanh() * spec.softcap
        hidden = sent(torch.from_numpy(~shown), query.device)
        weights = products.masked_fill(hidden[:, None, None], -torch.inf).softmax(-1).mean((1, 2))
        for one, own, found in zip(scoring, weights, places, strict=True):
            first = int(np.flatnonzero(found == one.segments.query[0])[0]) if one.asked else 0
            self.attention[one.candidate] = own[first : first + one.asked]

    def _copied(self, scoring: Sequence[_Scoring], window: int | None) -> tuple[list[Span], Tensor, Tensor]:
        """Return the spans of the copies, one for each sentence, and the rows of their states and keys."""
        spans, rows, keys, end = list[Span](), list[int](), list[NDArray[np.int64]](), 0
        for one in scoring:
            start, shared, others = one.segments.document[0], one.span.shared, one.others()
            for first, last in pairwise((0, *self._documents[one.candidate].ends)):
                places = np.concatenate((others, np.arange(max(start + first, shared), max(start + last, shared))))
                if window is not None:
                    places = places[abs(places - one.place) < window]
                count = shared + len(places)
                spans.append(Span(len(spans), 1, count - 1, count, end, shared))
                keys.append(places + one.first)
                rows.append(one.row)
                end += len(places)
        return spans, integers(rows), torch.from_numpy(np.concatenate(keys))

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
            tokens = [stop - start for start, stop in new.values()]
            self._documents |= zip(new, self._divide(list(new), tokens), strict=True)

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
        documents = [self._documents[candidate] for candidate in candidates]
        attention = [self.attention.get(candidate) for candidate in candidates]
        lost = _losses(model, pairs, documents, attention)
        highlights: dict[int, tuple[Highlight, ...]] = {}
        for one, document, losses, scores in zip(
            candidates, documents, lost, self.alone(model, candidates), strict=True
        ):
            worth = _LOSS * _standardised(losses) + (0 if scores is None else _standardised(scores))
            highlights[one] = _highlights(worth, document.places) if document.places else ()
        return highlights


class _Scoring(NamedTuple):
    """This class says where a scoring token is: in its slice, in its sequence, and what it sees."""

    candidate: int
    segments: Segments
    row: int
    place: int
    span: Span

    @property
    def first(self) -> int:
        """The row of the key at place 0 of the sequence, if the shared keys lay there as well."""
        return self.span.place - self.span.shared

    @property
    def asked(self) -> int:
        """The number of the query's tokens."""
        start, stop = self.segments.query
        return stop - start

    def others(self) -> NDArray[np.int64]:
        """Return the places of all tokens that are neither shared nor the document's."""
        start, stop = (max(place, self.span.shared) for place in self.segments.document)
        return np.concatenate((np.arange(self.span.shared, start), np.arange(stop, self.span.keys)))


def _finished(layer: Layer, states: Tensor, attended: Tensor) -> Tensor:
    """Return states ``[N, D]`` after a layer, by what they attended to, ``[N, heads, head size]``."""
    count = len(states)
    if layer.fills:
        fill = filled(count) - count
        states, attended = pad(states, (0, 0, 0, fill)), pad(attended, (0, 0, 0, 0, 0, fill))
    output: Tensor = layer.steps.finished(layer.spec, layer.weights, states, attended, layer.mlp)
    return output[:count]


def _losses(
    model: CrossEncoder,
    pairs: Sequence[TokenisedPair],
    documents: Sequence[Divided],
    attention: Sequence[Tensor | None],
) -> list[Floats]:
    """Return what the query loses of its likeness to each document without each sentence, ``[S]`` each.

    The likeness of two tokens grows with the cosine of their embeddings so fast that the best ones make the sum.

    Args:
        model: The model.
        pairs: The pairs of one query with some documents, at least one.
        documents: The sentences of the documents.
        attention: What each token of the query counts, ``[Q]``, by document; None if all count alike.
    """
    rows = [len(one.ends) + 1 for one in documents]  # the last is that of tokens in no sentence
    first = np.cumsum([0, *rows])
    places = [pair.segments.document for pair in pairs]
    owners = [
        row + one.owners(stop - start) for row, one, (start, stop) in zip(first, documents, places, strict=False)
    ]
    owner = torch.from_numpy(np.concatenate(owners))
    asked = _directions(model, _tokens(pairs[:1], [pairs[0].segments.query]))  # those of all pairs, or nearly so
    # Sums are made on the CPU, because some devices have no float64.
    likeness = torch.zeros(int(first[-1]), len(asked), dtype=torch.float64)
    told = _tokens(pairs, places)
    for start in range(0, len(owner), _BLOCK):
        block = slice(start, start + _BLOCK)
        cosines = _directions(model, told[:, block]) @ asked.T
        likeness.index_add_(0, owner[block], ((cosines - 1) / _LIKE).exp_().cpu().double())
    document = torch.from_numpy(np.repeat(np.arange(len(pairs)), rows))
    whole = likeness.new_zeros(len(pairs), len(asked)).index_add_(0, document, likeness)[document]
    losses = whole.clamp_min(_LEAST).log() - (whole - likeness).clamp_min(_LEAST).log()
    alike = losses.new_full((len(asked),), 1 / max(1, len(asked)))
    counts = torch.stack([alike if one is None else one.cpu().double() for one in attention])[document]
    found: Floats = (losses * counts).sum(1).numpy()
    return [one[:-1] for one in np.split(found, first[1:-1])]


def _tokens(pairs: Sequence[TokenisedPair], places: Sequence[tuple[int, int]]) -> Tensor:
    """Return ids, types and positions of the tokens at some places of each pair: int64 ``[3, T]``."""
    parts = [(pair, slice(*place)) for pair, place in zip(pairs, places, strict=True)]
    ids = chain.from_iterable(pair.input_ids[place] for pair, place in parts)
    types = chain.from_iterable(pair.token_type_ids[place] for pair, place in parts)
    return torch.stack((integers(ids), integers(types), numbers_of([place for _, place in parts])))


def _directions(model: CrossEncoder, tokens: Tensor) -> Tensor:
    """Return the directions of the embeddings of tokens, float32 ``[T, D]``."""
    states = torch.empty(tokens.shape[1], model.width, dtype=model.dtype, device=model.device)
    ids, types, positions = tokens
    model.embed(ids, types, positions, states)
    return normalize(states.float(), dim=1)


def _standardised(values: Floats) -> Floats:
    """Return values with a mean of 0 and a standard deviation of 1; zeros if all are equal."""
    spread = float(values.std()) if len(values) else 0.0
    return (values - values.mean()) / spread if spread > 0 else np.zeros_like(values)


def _highlights(worth: Floats, places: Sequence[tuple[int, int]]) -> tuple[Highlight, ...]:
    """Return the best sentence, and those that are nearly as good, best first."""
    best = float(worth.max())
    shares = worth / best if best > 0 else np.ones_like(worth)
    order = [index for index in np.argsort(-shares, kind="stable").tolist() if shares[index] >= _SHOWN]
    return tuple(Highlight(places[index][0], places[index][1], float(shares[index])) for index in order)
