"""Heads of decoder rerankers, in the place of the projection to the whole vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AnswerHead(nn.Module):
    """How much rather the model would answer yes than no: the difference of two rows of its output embedding.

    Its parameters ``yes`` and ``no`` are ``[1, D]``. Without ``no``, as some models have it, the score is the
    logit of yes alone.

    Args:
        width: D.
        softcap: What the model bounds its logits by, as Gemma 2 does; None for not at all.
    """

    def __init__(self, width: int, *, softcap: float | None) -> None:
        super().__init__()
        self.yes = nn.Parameter(torch.empty(1, width))
        self.no: nn.Parameter | None = nn.Parameter(torch.empty(1, width))
        self._softcap = softcap

    def forward(self, states: Tensor) -> Tensor:
        """Scores ``[N, 1]`` of float32 states ``[N, D]``."""
        if self.no is None:
            return self._logit(states, self.yes)
        return self._logit(states, self.yes) - self._logit(states, self.no)

    def _logit(self, states: Tensor, row: Tensor) -> Tensor:
        logits = states @ row.T
        return logits if self._softcap is None else self._softcap * torch.tanh(logits / self._softcap)


class LayerwiseHeads(nn.ModuleList):
    """One trained head for each of the later layers (bge-reranker-v2-minicpm-layerwise).

    Args:
        width: D.
        first: Number of the first layer that has a head. Layers before it are read with that one.
        last: Number of the last layer.
    """

    def __init__(self, width: int, first: int, last: int) -> None:
        super().__init__(_LinearHead(width) for _ in range(first, last + 1))
        self._first = first

    def forward(self, states: Tensor, number: int) -> Tensor:
        """Scores ``[N, 1]`` of float32 states ``[N, D]`` after a layer."""
        scores: Tensor = self[max(0, number - self._first)](states)
        return scores


class _LinearHead(nn.Module):
    """A linear map under the name that checkpoints have for it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_head = nn.Linear(width, 1, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        scores: Tensor = self.linear_head(states)
        return scores
