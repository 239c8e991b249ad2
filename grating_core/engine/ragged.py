"""All pairs packed along one token axis, without padding."""

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
    """The sequences of N candidates as one; a candidate has one sequence, or several windows.

    What all sequences begin with can be shared: it then comes once, before the first of them.

    Attributes:
        input_ids: int64 ``[T]``, the shared prefix and then the token ids of all sequences one after the other.
        token_type_ids: int64 ``[T]``.
        prefix: P, the tokens that all sequences share and that come first; 0 for none.
        lengths: Tokens of each sequence without the prefix; with it they sum to T.
        windows: How many of these sequences each of the N candidates has.
        segments: Where query and document are in each sequence, counted from the prefix's first token.
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
            candidates: The windows of each; none of them is without tokens.
            device: Where the batch goes.
            share_prefix: Take what all sequences begin with only once. Only with models whose tokens do not see
                what comes after them.
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
        """T, all tokens together."""
        return self.prefix + sum(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest piece that is never divided: a sequence, or the prefix."""
        return max(self.prefix, *self.lengths)

    def positions(self) -> Tensor:
        """int64 ``[T]``: the position of each token within its sequence, the prefix included, from 0."""
        device = self.input_ids.device
        lengths = torch.tensor(self.lengths, device=device)
        origins = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        return torch.arange(self.tokens, device=device) - pad(origins, (self.prefix, 0))

    def chunks(self, max_tokens: int) -> Iterator[Chunk]:
        """Consecutive sequences with at most ``max_tokens`` tokens together; a longer one goes alone.

        The first chunk begins with the prefix, and has nothing else if the first sequence does not fit with it.
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
        """int64: where the tokens of the kept candidates, and those of the prefix, are on the token axis."""
        device = self.input_ids.device
        kept = torch.zeros(len(self), dtype=torch.bool, device=device)
        kept[torch.tensor(keep, dtype=torch.int64, device=device)] = True
        kept = kept.repeat_interleave(torch.tensor(self.windows, device=device))
        kept = kept.repeat_interleave(torch.tensor(self.lengths, device=device))
        return pad(kept, (self.prefix, 0), value=True).nonzero()[:, 0]

    def select(self, keep: Sequence[int]) -> RaggedBatch:
        """The batch of the kept candidates only; ``keep`` is ascending."""
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
    """How many tokens all sequences begin with, leaving each at least one of its own; 0 where it does not pay."""
    if len(sequences) < 2:
        return 0
    # What the first and the last in order have in common, all between them have as well.
    first, last = min(sequences), max(sequences)
    shortest = min(map(len, sequences)) - 1
    length = next((i for i in range(shortest) if first[i] != last[i]), shortest)
    return length if length >= _WORTH_SHARING else 0


@dataclass(frozen=True)
class Chunk:
    """Consecutive sequences that are computed together.

    Attributes:
        tokens: Where their tokens are on the token axis.
        prefix: How many of these are the shared prefix, which comes before the sequences of the first chunk.
        lengths: Tokens of each sequence.
        segments: Where query and document are in each, counted from the prefix's first token.
    """

    tokens: slice
    prefix: int
    lengths: tuple[int, ...]
    segments: tuple[Segments, ...]

    @property
    def rows(self) -> int:
        """Rows computed for its tokens, fill included."""
        return filled(self.tokens.stop - self.tokens.start)


def filled(rows: int) -> int:
    """A number of rows rounded up to one of few.

    Matrix kernels are made for the number of rows they meet, and kept. Odd numbers cost some MB each, and every
    new chunk brings one; multiples of 16 to 64 share theirs. Above 128 at most one row in nine is
    fill, and one in a hundred at the usual chunk.
    """
    step = min(FILL, max(16, 1 << max(0, (rows - 1).bit_length() - 4)))
    return -(-rows // step) * step
