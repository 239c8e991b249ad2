"""A ragged batch packs all pairs along one token axis, without padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import pad

from grating_core.memory.hidden import FILL
from grating_core.text.pairs import Segments, TokenisedPair

_WORTH_SHARING = 8  # tokens


@dataclass(frozen=True)
class RaggedBatch:
    """A ragged batch joins the sequences of N candidates. A candidate has one sequence, or several windows.

    All sequences can share the tokens that they begin with. This prefix then comes once, before them.

    Attributes:
        input_ids: Token ids, int64 ``[T]``: the shared prefix, and then all sequences one after the other.
        token_type_ids: Types of the tokens, int64 ``[T]``.
        prefix: Number P of tokens in the shared prefix; 0 without one.
        lengths: Number of tokens of each sequence without the prefix; P and these sum to T.
        windows: Number of sequences of each of the N candidates.
        segments: Places of query and document in each sequence, counted from the prefix's first token.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    prefix: int
    lengths: tuple[int, ...]
    windows: tuple[int, ...]
    segments: tuple[Segments, ...]

    @classmethod
    def pack(
        cls, candidates: Sequence[Sequence[TokenisedPair]], device: torch.device, *, share_prefix: bool
    ) -> RaggedBatch:
        """Join the sequences of all candidates.

        Args:
            candidates: The windows of each candidate; every window has tokens.
            device: Device that the batch goes to.
            share_prefix: Whether to take once what all sequences begin with. This is only right for models whose
                tokens do not see what comes after them.
        """
        pairs = [pair for windows in candidates for pair in windows]
        prefix = _common_prefix([pair.input_ids for pair in pairs]) if share_prefix else 0
        ids, types = pairs[0].input_ids[:prefix], pairs[0].token_type_ids[:prefix]
        for pair in pairs:
            ids += pair.input_ids[prefix:]
            types += pair.token_type_ids[prefix:]
        return cls(
            torch.tensor(ids, device=device),
            torch.tensor(types, device=device),
            prefix,
            tuple(len(pair.input_ids) - prefix for pair in pairs),
            tuple(map(len, candidates)),
            tuple(pair.segments for pair in pairs),
        )

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def tokens(self) -> int:
        """The number T of all tokens together."""
        return self.prefix + sum(self.lengths)

    @property
    def longest(self) -> int:
        """The number of tokens of the longest piece that is never divided: a sequence, or the prefix."""
        return max(self.prefix, *self.lengths)

    def positions(self) -> Tensor:
        """Return each token's position within its sequence, the prefix included, from 0: int64 ``[T]``."""
        device = self.input_ids.device
        lengths = torch.tensor(self.lengths, device=device)
        origins = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        return torch.arange(self.tokens, device=device) - pad(origins, (self.prefix, 0))

    def chunks(self, max_tokens: int) -> Iterator[Chunk]:
        """Divide the batch into chunks of at most ``max_tokens`` tokens; a longer sequence is a chunk by itself.

        The first chunk begins with the prefix, and has nothing else if the first sequence does not fit beside it.
        """
        first, start, tokens, prefix = 0, 0, self.prefix, self.prefix
        for index, length in enumerate(self.lengths):
            if tokens and tokens + length > max_tokens:
                yield self._chunk(slice(start, start + tokens), prefix, slice(first, index))
                first, start, tokens, prefix = index, start + tokens, 0, 0
            tokens += length
        yield self._chunk(slice(start, start + tokens), prefix, slice(first, None))

    def _chunk(self, tokens: slice, prefix: int, sequences: slice) -> Chunk:
        return Chunk(tokens, prefix, self.lengths[sequences], self.segments[sequences])

    def token_index(self, keep: Sequence[int]) -> Tensor:
        """Return where the prefix's and the kept candidates' tokens are on the token axis, int64."""
        device = self.input_ids.device
        kept = torch.zeros(len(self), dtype=torch.bool, device=device)
        kept[torch.tensor(keep, dtype=torch.int64, device=device)] = True
        kept = kept.repeat_interleave(torch.tensor(self.windows, device=device))
        kept = kept.repeat_interleave(torch.tensor(self.lengths, device=device))
        return pad(kept, (self.prefix, 0), value=True).nonzero()[:, 0]

    def select(self, keep: Sequence[int]) -> RaggedBatch:
        """Return the batch of the kept candidates only; ``keep`` is ascending."""
        index = self.token_index(keep)
        ends = list(accumulate(self.windows))
        sequences = [i for kept in keep for i in range(ends[kept] - self.windows[kept], ends[kept])]
        return RaggedBatch(
            self.input_ids[index],
            self.token_type_ids[index],
            self.prefix,
            tuple(self.lengths[i] for i in sequences),
            tuple(self.windows[i] for i in keep),
            tuple(self.segments[i] for i in sequences),
        )


def _common_prefix(sequences: Sequence[list[int]]) -> int:
    """Count the tokens that all sequences begin with, but for the last of each; 0 where sharing does not pay."""
    if len(sequences) < 2:
        return 0
    # All sequences begin as the first and the last in order do.
    first, last = min(sequences), max(sequences)
    shortest = min(map(len, sequences)) - 1
    length = next((i for i in range(shortest) if first[i] != last[i]), shortest)
    return length if length >= _WORTH_SHARING else 0


@dataclass(frozen=True)
class Chunk:
    """A chunk is consecutive sequences that are computed together.

    Attributes:
        tokens: Place of the chunk on the token axis.
        prefix: Number of these tokens that belong to the shared prefix; 0 except in the first chunk.
        lengths: Number of tokens of each sequence.
        segments: Places of query and document in each sequence, counted from the prefix's first token.
    """

    tokens: slice
    prefix: int
    lengths: tuple[int, ...]
    segments: tuple[Segments, ...]

    @property
    def rows(self) -> int:
        """The number of rows that are computed for the chunk, fill included."""
        return filled(self.tokens.stop - self.tokens.start)


def filled(rows: int) -> int:
    """Round a number of rows up to one of few numbers.

    A matrix kernel is made for each number of rows, and kept. Every new chunk would bring an odd number, which
    costs some MB; multiples of 16 to 64 share their kernels. Above 128 rows at most one row in nine is fill, and
    one in a hundred at the usual chunk.
    """
    step = min(FILL, max(16, 1 << max(0, (rows - 1).bit_length() - 4)))
    return -(-rows // step) * step
