"""All pairs packed along one token axis, without padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grating_core.memory.hidden import FILL


@dataclass(frozen=True)
class RaggedBatch:
    """N sequences of any lengths as one.

    Attributes:
        input_ids: int64 ``[T]``, the token ids of all sequences one after the other.
        token_type_ids: int64 ``[T]``.
        lengths: Tokens of each sequence, N numbers that sum to T.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def pack(
        cls, input_ids: Sequence[list[int]], token_type_ids: Sequence[list[int]], device: torch.device
    ) -> RaggedBatch:
        """Join sequences of token ids; both arguments have the same lengths, none of them 0."""
        return cls(
            torch.tensor([token for ids in input_ids for token in ids], device=device),
            torch.tensor([token for ids in token_type_ids for token in ids], device=device),
            tuple(len(ids) for ids in input_ids),
        )

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """T, the tokens of all sequences together."""
        return sum(self.lengths)

    def positions(self) -> Tensor:
        """int64 ``[T]``: the position of each token within its sequence, from 0."""
        device = self.input_ids.device
        lengths = torch.tensor(self.lengths, device=device)
        starts = lengths.cumsum(0) - lengths
        return torch.arange(self.tokens, device=device) - starts.repeat_interleave(lengths)

    def chunks(self, max_tokens: int) -> Iterator[Chunk]:
        """Consecutive sequences with at most ``max_tokens`` tokens together; a longer one goes alone."""
        first = start = tokens = 0
        for index, length in enumerate(self.lengths):
            if tokens and tokens + length > max_tokens:
                yield Chunk(slice(first, index), slice(start, start + tokens), self.lengths[first:index])
                first, start, tokens = index, start + tokens, 0
            tokens += length
        yield Chunk(slice(first, len(self)), slice(start, start + tokens), self.lengths[first:])

    def token_index(self, keep: Sequence[int]) -> Tensor:
        """int64: where the tokens of the kept sequences are on the token axis."""
        device = self.input_ids.device
        kept = torch.zeros(len(self), dtype=torch.bool, device=device)
        kept[torch.tensor(keep, dtype=torch.int64, device=device)] = True
        return kept.repeat_interleave(torch.tensor(self.lengths, device=device)).nonzero()[:, 0]

    def select(self, keep: Sequence[int]) -> RaggedBatch:
        """The batch of the kept sequences only; ``keep`` is ascending."""
        index = self.token_index(keep)
        return RaggedBatch(self.input_ids[index], self.token_type_ids[index], tuple(self.lengths[i] for i in keep))


@dataclass(frozen=True)
class Chunk:
    """Consecutive sequences that are computed together.

    Attributes:
        sequences: Which sequences of the batch.
        tokens: Where their tokens are on the token axis.
        lengths: Tokens of each sequence.
    """

    sequences: slice
    tokens: slice
    lengths: tuple[int, ...]

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
