"""A ragged batch packs the pairs of all requests of a pass along one token axis, without padding."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise

import torch
from torch import Tensor

from grating_core.kernels.operands import Span, Texts
from grating_core.layers.sending import integers, numbers_of
from grating_core.lens.features import texts_of
from grating_core.memory.hidden import FILL
from grating_core.models.family import Pooling
from grating_core.text.pairs import Segments, TokenisedPair

_WORTH_SHARING = 8  # tokens

Encoded = Sequence[Sequence[TokenisedPair]]
"""The windows of each candidate of a request; every window has tokens."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece is consecutive tokens of the token axis that belong to one sequence.

    Attributes:
        request: Number of the request.
        candidate: Number of the candidate in its request; None for the tokens that a request's sequences share.
        length: Number of the piece's tokens.
        before: Number of shared tokens of the request that come before it; 0 without any.
        segments: Places of query and document, counted from the first shared token; None for the shared tokens.
    """

    request: int
    candidate: int | None
    length: int
    before: int = 0
    segments: Segments | None = None


@dataclass(frozen=True)
class Part:
    """A part is what a slice has of a piece.

    Attributes:
        piece: The piece.
        rows: Place of the tokens in the slice.
        start: Number of the first of them in the piece.
    """

    piece: Piece
    rows: slice
    start: int

    @property
    def length(self) -> int:
        """The number of tokens."""
        return int(self.rows.stop - self.rows.start)

    @property
    def stop(self) -> int:
        """The number of the token after the last, in the piece."""
        return self.start + self.length

    @property
    def whole(self) -> bool:
        """Whether the slice has the whole piece."""
        return self.length == self.piece.length

    @cached_property
    def texts(self) -> Texts | None:
        """Where a lens finds the texts of a sequence, see :func:`grating_core.lens.features.texts_of`."""
        return texts_of(self)


@dataclass(frozen=True)
class Slice:
    """A slice is consecutive tokens that go through a step of a layer together: of one request, or whole requests.

    Attributes:
        tokens: Place on the token axis.
        parts: What the slice has of each piece, in order.
        only: ``"first"`` or ``"last"`` if only the output of that token of each sequence is needed; ``"mean"`` for
            the output of all tokens.
        keys: Whether the slice's keys and values are computed in this step.
        queries: Whether the slice's queries and output are computed in this step.
    """

    tokens: slice
    parts: tuple[Part, ...]
    only: Pooling = "mean"
    keys: bool = True
    queries: bool = True

    @property
    def rows(self) -> int:
        """The number of rows that are computed, fill included."""
        return filled(self.tokens.stop - self.tokens.start)

    @property
    def changed(self) -> bool:
        """Whether the step leaves other hidden states."""
        return self.queries

    @property
    def whole(self) -> bool:
        """Whether the slice has its pieces whole, and not a part of one piece."""
        return self.parts[0].whole

    @cached_property
    def _found(self) -> list[tuple[Part, Part]]:
        """Each part whose output is asked for, and what of it."""
        if not self.queries or self.only == "mean":
            return [(part, part) for part in self.parts if self.queries]
        found = list[tuple[Part, Part]]()
        for part in self.parts:
            place = 0 if self.only == "first" else part.piece.length - 1
            if part.piece.candidate is not None and part.start <= place < part.stop:
                row = len(found)
                found.append((part, Part(part.piece, slice(row, row + 1), place)))
        return found

    @cached_property
    def asked(self) -> list[Part]:
        """Whose output is asked for. Single tokens have their rows counted from 0 without gaps."""
        return [wanted for _, wanted in self._found]

    @cached_property
    def asked_by_request(self) -> list[tuple[int, list[Part]]]:
        """Whose output is asked for, request by request."""
        return [(number, list(own)) for number, own in groupby(self.asked, lambda part: part.piece.request)]

    @cached_property
    def places(self) -> list[int] | None:
        """The rows of the single tokens that are asked for; None where all tokens are."""
        if self.only == "mean":
            return None
        return [part.rows.start + wanted.start - part.start for part, wanted in self._found]

    @cached_property
    def spans(self) -> list[Span]:
        """What the queries attend to: keys of this slice, or all that are kept of a piece."""
        found = []
        for part, wanted in self._found:
            before, length = part.piece.before, part.piece.length
            place, shared = (part.rows.start, before) if part.whole else (0, 0)
            first = before + wanted.start
            found.append(Span(wanted.rows.start, wanted.length, first, before + length, place, shared))
        return found


@dataclass(frozen=True)
class RaggedBatch:
    """A ragged batch joins the sequences of all candidates. A candidate has one sequence, or several windows.

    The sequences of a request can share the tokens that they begin with. These tokens then come once, before them.
    The batch is on the CPU, whatever device computes, so that nobody waits for a device to know what to compute.

    Attributes:
        input_ids: Token ids, int64 ``[T]``.
        token_type_ids: Types of the tokens, int64 ``[T]``.
        pieces: The pieces along the token axis.
        mixed: Whether a slice may have several requests.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    pieces: tuple[Piece, ...]
    mixed: bool = False

    @classmethod
    def pack(cls, requests: Sequence[Encoded], *, share_prefix: bool, mixed: bool = False) -> RaggedBatch:
        """Join the sequences of all requests.

        Args:
            requests: The requests, each with a candidate or more.
            share_prefix: Whether to take once what all sequences of a request begin with. This is only right for
                models whose tokens do not see what comes after them.
            mixed: Whether a slice may have several requests. This is only right for kernels that give a token the
                same bits whatever is computed beside it. Requests with a shared prefix are not mixed.
        """
        ids, types = array("q"), array("q")
        pieces: list[Piece] = []
        for request, candidates in enumerate(requests):
            sequences = [(number, pair) for number, windows in enumerate(candidates) for pair in windows]
            prefix = common_prefix([pair.input_ids for _, pair in sequences]) if share_prefix else 0
            if prefix:
                ids.extend(sequences[0][1].input_ids[:prefix])
                types.extend(sequences[0][1].token_type_ids[:prefix])
                pieces.append(Piece(request, None, prefix))
            for number, pair in sequences:
                ids.extend(pair.input_ids[prefix:])
                types.extend(pair.token_type_ids[prefix:])
                pieces.append(Piece(request, number, len(pair.input_ids) - prefix, prefix, pair.segments))
        return cls(integers(ids), integers(types), tuple(pieces), mixed and not share_prefix)

    @property
    def tokens(self) -> int:
        """The number T of all tokens."""
        return len(self.input_ids)

    @property
    def longest(self) -> int:
        """The number of tokens of the longest sequence, what it shares included."""
        return max(piece.before + piece.length for piece in self.pieces)

    @cached_property
    def tokens_by_request(self) -> Counter[int]:
        """The number of tokens of each request."""
        found = Counter[int]()
        for piece in self.pieces:
            found[piece.request] += piece.length
        return found

    @property
    def lengths(self) -> Counter[tuple[int, int | None]]:
        """The number of tokens of each request's candidates, without those that they share."""
        found = Counter[tuple[int, int | None]]()
        for piece in self.pieces:
            found[piece.request, piece.candidate] += piece.length
        return found

    @cached_property
    def positions(self) -> Tensor:
        """The positions of all tokens, int64 ``[T]``, counted from 0 within each sequence."""
        return numbers_of([slice(piece.before, piece.before + piece.length) for piece in self.pieces])

    @cached_property
    def _slices(self) -> dict[tuple[int, Pooling], list[Slice]]:
        return {}

    def slices(self, most: int, only: Pooling = "mean") -> list[Slice]:
        """Divide the batch into slices of at most ``most`` tokens, in the order in which they go through a layer.

        A piece that is longer goes through the layer twice: first its keys and values, then the rest. A request is
        divided as it would be alone, and shares a slice with others only as a whole, so that it is computed bit by
        bit as it would be alone. The same slices are returned again.

        Args:
            most: The most tokens of a slice.
            only: See :class:`Slice`.
        """
        if (most, only) not in self._slices:
            self._slices[most, only] = list(self._divided(most, only))
        return self._slices[most, only]

    def _divided(self, most: int, only: Pooling) -> Iterator[Slice]:
        start, end, parts = 0, 0, list[Part]()
        for piece in self.pieces:
            stop = end + piece.length
            if parts and (stop - start > most or not self._goes_on(parts[-1].piece, piece, most - (end - start))):
                yield Slice(slice(start, end), tuple(parts), only)
                start, parts = end, []
            if piece.length > most:
                yield from _twice(piece, start, most, only)
                start = stop
            else:
                parts.append(Part(piece, slice(end - start, stop - start), 0))
            end = stop
        if parts:
            yield Slice(slice(start, end), tuple(parts), only)

    def _goes_on(self, before: Piece, piece: Piece, room: int) -> bool:
        """Tell whether a piece may share a slice with the piece before it, where there is room for some tokens."""
        if piece.request == before.request:
            return True
        return self.mixed and self.tokens_by_request[piece.request] <= room

    def select(self, keep: Mapping[int, Collection[int]]) -> tuple[RaggedBatch, list[slice]]:
        """Return the batch of some candidates only, and where its tokens were: runs in rising order.

        Args:
            keep: Numbers of the candidates to keep, by request. Without any, a request leaves as a whole.
        """
        pieces, runs, end = list[Piece](), list[slice](), 0
        for piece in self.pieces:
            start, end = end, end + piece.length
            kept = keep.get(piece.request)
            if kept and (piece.candidate is None or piece.candidate in kept):
                pieces.append(piece)
                if runs and runs[-1].stop == start:
                    start = runs.pop().start
                runs.append(slice(start, end))
        ids, types = (
            torch.cat([numbers[run] for run in runs]) if runs else numbers[:0]
            for numbers in (self.input_ids, self.token_type_ids)
        )
        return RaggedBatch(ids, types, tuple(pieces), self.mixed), runs


def _twice(piece: Piece, start: int, most: int, only: Pooling) -> Iterator[Slice]:
    """Yield the slices of a long piece that begins at ``start``: first for keys and values, then for the rest."""
    count = -(-piece.length // most)
    edges = [piece.length * number // count for number in range(count + 1)]
    places = [(slice(start + a, start + b), (Part(piece, slice(0, b - a), a),)) for a, b in pairwise(edges)]
    for tokens, parts in places:
        yield Slice(tokens, parts, only, queries=False)
    for tokens, parts in places:
        rest = Slice(tokens, parts, only, keys=False)
        if rest.asked:
            yield rest


def common_prefix(sequences: Sequence[list[int]]) -> int:
    """Count the tokens that all sequences begin with, but for the last of each; 0 where sharing does not pay."""
    if len(sequences) < 2:
        return 0
    # All sequences begin as the first and the last in order do.
    first, last = min(sequences), max(sequences)
    shortest = min(map(len, sequences)) - 1
    length = next((i for i in range(shortest) if first[i] != last[i]), shortest)
    return length if length >= _WORTH_SHARING else 0


def filled(rows: int) -> int:
    """Round a number of rows up to one of few numbers.

    A matrix kernel is made for each number of rows, and kept. Every new slice would bring an odd number, which
    costs some MB; multiples of 16 to 64 share their kernels. Above 128 rows at most one row in nine is fill, and
    one in a hundred at the usual slice.
    """
    step = min(FILL, max(16, 1 << max(0, (rows - 1).bit_length() - 4)))
    return -(-rows // step) * step
