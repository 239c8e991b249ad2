"""Highlights are the sentences of a document that carried its score, found in the pass that scores it.

Nothing is trained for it. Two numbers tell what a sentence is worth. After a third of the layers, each token of
the query looks for the token of the document most like it: the *loss* of a sentence is how much of that likeness
the rest of the document lacks. In the last quarter of the layers the scoring token goes on in as many copies as
there are sentences, and each copy sees the query and a single sentence: its score says how far that sentence goes
*alone*. ``benchmarks/highlights.py`` compares both with removing sentences one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize, pad

from grating_core.engine.ragged import Part, filled
from grating_core.kernels.operands import Seen, Span
from grating_core.layers.attention import ragged_attention
from grating_core.layers.rotary import Angles
from grating_core.layers.sending import integers, sent
from grating_core.models.cross_encoder import CrossEncoder
from grating_core.models.family import ModelSpec
from grating_core.models.layered import Layer
from grating_core.results import Highlight
from grating_core.text.pairs import Template
from grating_core.text.sentences import sentences

Places = Sequence[tuple[int, int]]
"""The first character of each sentence of a text, and the one behind its last."""

_LOSS = 0.5  # the weight of the loss beside the score alone; both are standardised within the document
_SHOWN = 0.5  # the least worth of a sentence that is shown, as a share of the best sentence's


_CHARACTERS = 8  # characters of a document for each token of the window, in which sentences are looked for


class Divided(NamedTuple):
    """This class says how a document is divided into sentences.

    Attributes:
        places: Places of the sentences in the text.
        tokens: The number of tokens of each sentence, at least one.
    """

    places: Places
    tokens: Sequence[int]


class Highlighter:
    """A highlighter follows the sentences of one request's documents through the layers.

    Args:
        spec: The model's spec.
        divide: Function that divides the document of a candidate.
    """

    def __init__(self, spec: ModelSpec, divide: Callable[[int], Divided]) -> None:
        self._divide = divide
        self._pooling = spec.pooling
        self._compared = max(1, spec.depth // 3)
        self._before = spec.depth - max(1, spec.depth // 4)
        relative = any(layer.relative is not None for layer in spec.layers)
        # A mean has no scoring token, and relative positions would see gaps between what is left.
        self._follows = self._before > 0 and spec.pooling != "mean" and not relative
        self._documents: dict[int, Divided] = {}
        self._prefix: Tensor | None = None
        self._pieces: list[Tensor] = []
        self._cosines: dict[int, Tensor] = {}  # of each token of a document with each of the query
        self._own: dict[int, Tensor] = {}  # the scoring token's state
        self._copies: dict[int, Tensor] = {}  # and what has become of it for each sentence
        self._keys: dict[tuple[int, int | None], tuple[NDArray[np.int64], list[int]]] = {}

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

        def divide(candidate: int) -> Divided:
            text = documents[candidate][: _CHARACTERS * template.window]
            places = sentences(text)
            parts = [text[start:stop] for start, stop in places]
            counts = template.count_each(parts)
            found = [
                ((stop - len(part.lstrip()), stop), count)
                for (_, stop), part, count in zip(places, parts, counts, strict=True)
                if count
            ]
            return Divided([place for place, _ in found], [count for _, count in found])

        return cls(spec, divide)

    def see(self, number: int, states: Tensor, parts: Sequence[Part]) -> None:
        """Take the states ``[T, D]`` after a layer of the next parts of the request."""
        for part in parts:
            if number == self._compared:
                self._compare(states[part.rows], part)
            if number == self._before and self._follows and (candidate := part.piece.candidate) is not None:
                own = self._scoring(part) - part.start
                if 0 <= own < part.length:
                    self._own[candidate] = states[part.rows.start + own].clone()

    def _compare(self, states: Tensor, part: Part) -> None:
        piece = part.piece
        if piece.segments is None or piece.candidate is None:
            held = [] if self._prefix is None or not part.start else [self._prefix]
            self._prefix = torch.cat((*held, states.float()))
            return
        self._pieces.append(states.to(torch.float32, copy=True))  # the next slice may take their memory
        if part.stop < piece.length:
            return
        before = [] if self._prefix is None or not piece.before else [self._prefix]
        told = normalize(torch.cat((*before, *self._pieces)), dim=1)
        self._pieces.clear()
        query, document = (told[slice(*place)] for place in (piece.segments.query, piece.segments.document))
        self._cosines[piece.candidate] = document @ query.T

    def _scoring(self, part: Part) -> int:
        """Return the number of the scoring token in a part's piece."""
        return 0 if self._pooling == "first" else part.piece.length - 1

    def follow(self, number: int, layer: Layer, angles: Angles | None, parts: Sequence[Part], seen: Seen) -> None:
        """Take the copies of the scoring tokens of a slice through a layer.

        Args:
            number: The layer.
            layer: The layer.
            angles: Angles at the positions from 0 on; None if the layer has no rotary positions.
            parts: The request's parts of the slice.
            seen: The keys and values of the slice's tokens. A document that does not fit into a slice is not
                followed: its loss alone tells.
        """
        if number <= self._before:
            return
        whole = [(one, one.piece.candidate) for one in parts if one.piece.candidate in self._own and one.whole]
        if not whole:
            return
        spans, keys, places, states = list[Span](), list[NDArray[np.int64]](), list[int](), list[Tensor]()
        end = 0
        for one, candidate in whole:
            assert candidate is not None
            shared = one.piece.before
            rows, counts = self._seen_by(candidate, one, layer.spec.window)
            for count in counts:
                spans.append(Span(len(spans), 1, shared + count - 1, shared + count, end, shared))
                end += count
            keys.append(rows + one.rows.start)
            places += [shared + self._scoring(one)] * len(counts)
            copies = self._copies.get(candidate)
            states.append(self._own[candidate].expand(len(counts), -1) if copies is None else copies)
        after = _step(layer, angles, torch.cat(states), places, np.concatenate(keys), spans, seen)
        for (_, candidate), own in zip(whole, torch.split(after, [len(some) for some in states]), strict=True):
            assert candidate is not None
            self._copies[candidate] = own

    def _seen_by(self, candidate: int, part: Part, window: int | None) -> tuple[NDArray[np.int64], list[int]]:
        """Return the numbers, in their piece, of the tokens that each copy sees, and how many these are."""
        if (candidate, window) not in self._keys:
            piece = part.piece
            assert piece.segments is not None
            start, stop = (place - piece.before for place in piece.segments.document)
            rest = np.r_[0:start, stop : piece.length]
            seen = [np.r_[rest, first:last] for first, last in self._sentences(candidate, start, stop)]
            if window is not None:
                seen = [rows[abs(rows - self._scoring(part)) < window] for rows in seen]
            self._keys[candidate, window] = np.concatenate(seen), list(map(len, seen))
        return self._keys[candidate, window]

    def _sentences(self, candidate: int, start: int, stop: int) -> list[tuple[int, int]]:
        """Return the tokens of each sentence of a document from ``start`` to ``stop``; its end may be cut."""
        if candidate not in self._documents:
            self._documents[candidate] = self._divide(candidate)
        ends = np.minimum(start + np.cumsum([0, *self._documents[candidate].tokens]), stop).tolist()
        found = [(first, last) for first, last in pairwise(ends) if first < last]
        return found or [(start, stop)]

    def alone(self, model: CrossEncoder, candidate: int) -> NDArray[np.float64] | None:
        """Return what each sentence of a candidate scores alone, ``[S]``; None if it was not followed."""
        if (copies := self._copies.get(candidate)) is None:
            return None
        scores = model.score(model.normed(copies.float()), model.depth)
        return scores.cpu().numpy().astype(np.float64)

    def found(self, model: CrossEncoder, candidate: int) -> tuple[Highlight, ...]:
        """Return the highlights of a candidate, best first; none if its pass ended too early or it has no text.

        Args:
            model: The model.
            candidate: Number of the candidate.
        """
        cosines = self._cosines.get(candidate)
        if cosines is None or not len(cosines):
            return ()
        parts = self._sentences(candidate, 0, len(cosines))
        places = self._documents[candidate].places
        if not places:  # the tokens are those of white space
            return ()
        worth = _LOSS * _standardised(_losses(cosines, parts))
        if (scores := self.alone(model, candidate)) is not None:
            worth = worth + _standardised(scores)
        return _highlights(worth, places)


def _step(
    layer: Layer,
    angles: Angles | None,
    states: Tensor,
    places: list[int],
    keys: NDArray[np.int64],
    spans: list[Span],
    seen: Seen,
) -> Tensor:
    """Take single tokens ``[N, D]`` at some positions through a layer; each sees the keys of its span."""
    spec, steps, count = layer.spec, layer.steps, len(states)
    if layer.fills:
        fill = filled(count) - count
        states, places = pad(states, (0, 0, 0, fill)), places + [0] * fill
    turned = None if angles is None else angles.at(sent(integers(places), states.device))
    query = steps.queries(spec, layer.weights, steps.prepared(spec, layer.weights, states), turned)
    rows = sent(torch.from_numpy(keys), states.device)
    key, value = seen.key.index_select(0, rows), seen.value.index_select(0, rows)
    every = replace(spec, causal=False, window=None)  # the spans have only what the scoring token sees
    attended = ragged_attention(every, query, Seen(key, value, seen.shared), spans)
    output: Tensor = steps.finished(spec, layer.weights, states, attended, layer.mlp)
    return output[:count]


def _losses(cosines: Tensor, sentences: Sequence[tuple[int, int]]) -> NDArray[np.float64]:
    """Return what the query's tokens lose of their best cosines without each sentence, on average: ``[S]``."""
    best = torch.stack([cosines[first:last].amax(0) for first, last in sentences])
    losses = torch.zeros_like(best)
    if best.numel() and len(best) > 1:
        first, second = best.topk(2, dim=0)[0]
        losses = torch.where(best == first, first - second, losses)
    found: NDArray[np.float64] = losses.mean(1).nan_to_num().cpu().numpy().astype(np.float64)
    return found


def _standardised(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return values with a mean of 0 and a standard deviation of 1; zeros if all are equal."""
    spread = float(values.std())
    return (values - values.mean()) / spread if spread > 0 else np.zeros_like(values)


def _highlights(worth: NDArray[np.float64], places: Places) -> tuple[Highlight, ...]:
    """Return the best sentence, and those that are nearly as good, best first."""
    best = float(worth.max())
    shares = worth / best if best > 0 else np.ones_like(worth)
    order = [index for index in np.argsort(-shares, kind="stable").tolist() if shares[index] >= _SHOWN]
    return tuple(Highlight(places[index][0], places[index][1], float(shares[index])) for index in order)
