"""A ragged batch packs the pairs of all requests of a pass along one token axis, without padding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, compress, pairwise

import torch
from torch import Tensor

from grating_core.layers.sending import numbers_of
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


@dataclass(frozen=True, slots=True)
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
    def stop(self) -> int:
        """The number of the token after the last, in the piece."""
        return self.start + int(self.rows.stop - self.rows.start)

    @property
    def whole(self) -> bool:
        """Whether the slice has the whole piece."""
        return self.stop - self.start == self.piece.length


@dataclass(frozen=True, slots=True)
class Slice:
    """A slice is consecutive tokens that go through a step of a layer together.

    Attributes:
        tokens: Place on the token axis.
        parts: What the slice has of each piece, in order.
        keys: Whether the slice's keys and values are computed in this step.
        queries: Whether the slice's queries and output are computed in this step.
        changed: Whether the hidden states that this step leaves are needed.
    """

    tokens: slice
    parts: tuple[Part, ...]
    keys: bool = True
    queries: bool = True
    changed: bool = True

    @property
    def rows(self) -> int:
        """The number of rows that are computed, fill included."""
        return filled(self.tokens.stop - self.tokens.start)

    def asked(self, only: Pooling) -> list[tuple[Part, Part]]:
        """Return each part whose output is asked for, and what of it is asked for.

        Args:
            only: ``"first"`` or ``"last"`` if only the output of that token of each sequence is needed, whose rows
                are then counted from 0 without gaps; ``"mean"`` for the output of all tokens.
        """
        if only == "mean":
            return [(part, part) for part in self.parts]
        found = list[tuple[Part, Part]]()
        for part in self.parts:
            place = 0 if only == "first" else part.piece.length - 1
            if part.piece.candidate is not None and part.start <= place < part.stop:
                row = len(found)
                found.append((part, Part(part.piece, slice(row, row + 1), place)))
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
    """

    input_ids: Tensor
    token_type_ids: Tensor
    pieces: tuple[Piece, ...]

    @classmethod
    def pack(cls, requests: Sequence[Encoded], *, share_prefix: bool) -> RaggedBatch:
        """Join the sequences of all requests.

        Args:
            requests: The requests, each with a candidate or more.
            share_prefix: Whether to take once what all sequences of a request begin with. This is only right for
                models whose tokens do not see what comes after them.
        """
        ids: list[int] = []
        types: list[int] = []
        pieces: list[Piece] = []
        for request, candidates in enumerate(requests):
            sequences = [(number, pair) for number, windows in enumerate(candidates) for pair in windows]
            prefix = common_prefix([pair.input_ids for _, pair in sequences]) if share_prefix else 0
            if prefix:
                ids += sequences[0][1].input_ids[:prefix]
                types += sequences[0][1].token_type_ids[:prefix]
                pieces.append(Piece(request, None, prefix))
            for number, pair in sequences:
                ids += pair.input_ids[prefix:]
                types += pair.token_type_ids[prefix:]
                pieces.append(Piece(request, number, len(pair.input_ids) - prefix, prefix, pair.segments))
        return cls(torch.tensor(ids), torch.tensor(types), tuple(pieces))

    @property
    def tokens(self) -> int:
        """The number T of all tokens."""
        return len(self.input_ids)

    @property
    def longest(self) -> int:
        """The number of tokens of the longest sequence, what it shares included."""
        return max(piece.before + piece.length for piece in self.pieces)

    @property
    def tokens_by_request(self) -> Counter[int]:
        """The number of tokens of each request."""
        found = Counter[int]()
        for piece in self.pieces:
            found[piece.request] += piece.length
        return found

    @cached_property
    def positions(self) -> Tensor:
        """The positions of all tokens, int64 ``[T]``, counted from 0 within each sequence."""
        return numbers_of([slice(piece.before, piece.before + piece.length) for piece in self.pieces])

    def slices(self, most: int, *, changed: bool = True, only: Pooling = "mean") -> list[Slice]:
        """Divide the batch into slices of at most ``most`` tokens, in the order in which they go through a layer.

        A piece that is longer goes through the layer twice: first its keys and values, then the rest. A slice
        belongs to one request, so that a request is computed bit by bit as it would be alone.

        Args:
            most: The most tokens of a slice.
            changed: Whether hidden states after the layer are needed.
            only: See :meth:`Slice.asked`.
        """
        found: list[Slice] = []
        start, waiting = 0, list[Piece]()

        def flush() -> None:
            nonlocal start
            if waiting:
                ends = list(accumulate((piece.length for piece in waiting), initial=0))
                parts = (Part(p, slice(a, b), 0) for p, (a, b) in zip(waiting, pairwise(ends), strict=True))
                found.append(Slice(slice(start, start + ends[-1]), tuple(parts), changed=changed))
                start += ends[-1]
                waiting.clear()

        room = most
        for piece in self.pieces:
            if piece.length > room or (waiting and piece.request != waiting[0].request):
                flush()
                room = most
            if piece.length > most:
                found += _twice(piece, start, most, changed, only)
                start += piece.length
            else:
                waiting.append(piece)
                room -= piece.length
        flush()
        return found

    def select(self, keep: Mapping[int, Collection[int]]) -> tuple[RaggedBatch, Tensor]:
        """Return the batch of some candidates only, and where its tokens were, int64 and ascending.

        Args:
            keep: Numbers of the candidates to keep, by request. Without any, a request leaves as a whole.
        """
        kept = [
            bool(keep.get(piece.request)) and (piece.candidate is None or piece.candidate in keep[piece.request])
            for piece in self.pieces
        ]
        ends = accumulate(piece.length for piece in self.pieces)
        runs = [slice(end - piece.length, end) for piece, end in zip(self.pieces, ends, strict=True)]
        index = numbers_of(list(compress(runs, kept)))
        pieces = tuple(compress(self.pieces, kept))
        return RaggedBatch(self.input_ids[index], self.token_type_ids[index], pieces), index


def _twice(piece: Piece, start: int, most: int, changed: bool, only: Pooling) -> Iterator[Slice]:
    """Yield the slices of a long piece that begins at ``start``: first for keys and values, then for the rest."""
    count = -(-piece.length // most)
    edges = [piece.length * number // count for number in range(count + 1)]
    places = [(slice(start + a, start + b), (Part(piece, slice(0, b - a), a),)) for a, b in pairwise(edges)]
    for tokens, parts in places:
        yield Slice(tokens, parts, queries=False, changed=False)
    for tokens, parts in places:
        rest = Slice(tokens, parts, keys=False, changed=changed)
        if rest.asked(only):
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
