"""A loaded cross-encoder: a layered model whose head reads scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grating_core.models.layered import LayeredModel


class CrossEncoder(LayeredModel):
    """A layered model with the head of a reranker, which is float32 whatever the compute dtype."""

    @property
    def pooling(self) -> str:
        """What the head reads: ``"first"`` or ``"last"`` for that token, ``"mean"`` for the mean of all."""
        return self._family.pooling(self.module.config)

    @property
    def reads_one_token(self) -> bool:
        """Whether the head reads a single token of a sequence."""
        return self.pooling != "mean"

    def scoring_positions(self, lengths: Sequence[int]) -> Tensor:
        """int64 ``[N]``: where on the token axis the head reads each of N sequences, when it reads one token."""
        tokens = torch.tensor(lengths, dtype=torch.int64, device=self.device)
        ends = tokens.cumsum(0)
        return ends - 1 if self.pooling == "last" else ends - tokens

    def read_scores(self, number: int, hidden: Tensor, lengths: Sequence[int]) -> Tensor:
        """Relevance scores by the model's own head, in float32 whatever the compute dtype.

        Args:
            number: The layer that the states come from.
            hidden: ``[1, T, D]`` or longer; what lies behind the sequences is not looked at.
            lengths: Tokens of each of the N sequences, T together. A sequence may be cut to its scoring
                position when :attr:`reads_one_token`.

        Returns:
            float32 ``[N]``.
        """
        if self.reads_one_token:
            states = self._norm(hidden[0, self.scoring_positions(lengths)].float())
        else:
            tokens = self._norm(hidden[0, : sum(lengths)].float())
            states = torch.stack([part.mean(0) for part in tokens.split(list(lengths))])
        return self._family.classify(self.module, states, number)[:, 0]
