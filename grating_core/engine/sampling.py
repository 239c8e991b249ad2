"""Which token comes next, given the logits of all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper


class Sampler:
    """Picks tokens: the likeliest, or at random by what the model thinks of them.

    Args:
        temperature: What logits are divided by; 0 for the likeliest token always.
        top_p: The likeliest tokens that have this probability together are picked from.
        seed: Of the random numbers; None for others every time.
        device: Where logits are.
    """

    def __init__(self, temperature: float, top_p: float, seed: int | None, device: torch.device) -> None:
        self._greedy = temperature == 0
        self._processors = LogitsProcessorList()
        if not self._greedy:
            self._processors.append(TemperatureLogitsWarper(float(temperature)))
            if top_p < 1:
                self._processors.append(TopPLogitsWarper(float(top_p)))
        self._random = torch.Generator(device)
        if seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(seed)

    def pick(self, logits: Tensor) -> int:
        """The next token, from float32 logits ``[V]``."""
        if self._greedy:
            return int(logits.argmax())
        before: Any = None  # the tokens, which these processors do not look at
        # Differences to the largest, for divided by a small temperature logits would overflow.
        scores = self._processors(before, (logits - logits.max())[None])
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._random))
