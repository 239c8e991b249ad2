"""Heads of decoder rerankers take the place of the projection to the whole vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AnswerHead(nn.Module):
    """The score of an answer head is the logit of yes less the logit of no.

    The parameters ``yes`` and ``no`` are rows ``[1, D]`` of the output embedding. Some models have no ``no``:
    their score is the logit of yes alone.

    Args:
        width: Width D of a state.
        softcap: The bound of the logits (Gemma 2 has one); None for no bound.
    """

    def __init__(self, width: int, *, softcap: float | None) -> None:
        super().__init__()
        self.yes = nn.Parameter(torch.empty(1, width))
        self.no: nn.Parameter | None = nn.Parameter(torch.empty(1, width))
        self._softcap = softcap

    def forward(self, states: Tensor) -> Tensor:
        """Return the scores ``[N, 1]`` of float32 states ``[N, D]``."""
        if self.no is None:
            return self._logit(states, self.yes)
        return self._logit(states, self.yes) - self._logit(states, self.no)

    def _logit(self, states: Tensor, row: Tensor) -> Tensor:
        logits = states @ row.T
        return logits if self._softcap is None else self._softcap * torch.tanh(logits / self._softcap)


class LayerwiseHeads(nn.ModuleList):
    """This class holds a trained head for each of the later layers (bge-reranker-v2-minicpm-layerwise).

    Args:
        width: Width D of a state.
        first: Number of the first layer that has a head. Earlier layers are read with this head.
        last: Number of the last layer.
    """

    def __init__(self, width: int, first: int, last: int) -> None:
        super().__init__(_LinearHead(width) for _ in range(first, last + 1))
        self._first = first

    def forward(self, states: Tensor, number: int) -> Tensor:
        """Return the scores ``[N, 1]`` of float32 states ``[N, D]`` after a layer."""
        scores: Tensor = self[max(0, number - self._first)](states)
        return scores


class _LinearHead(nn.Module):
    """This class gives a linear map the name that checkpoints use."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_head = nn.Linear(width, 1, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        scores: Tensor = self.linear_head(states)
        return scores
