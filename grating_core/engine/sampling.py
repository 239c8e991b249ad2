"""A sampler picks the next token from the logits of all tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper


class Sampler:
    """A sampler picks the likeliest token, or a token at random by the model's probabilities.

    Args:
        temperature: Divisor of the logits; 0 for the likeliest token always.
        top_p: Probability that the tokens to pick from have together, the likeliest first.
        seed: Seed of the random numbers; None for other numbers every time.
        device: Device of the logits.
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
            self._random.manual_seed(int(seed))

    def pick(self, logits: Tensor) -> int:
        """Pick the next token from float32 logits ``[V]``."""
        if self._greedy:
            return int(logits.argmax())
        before: Any = None  # the tokens before, which these processors do not look at
        # Differences to the largest logit: divided by a small temperature, logits would overflow.
        scores = self._processors(before, (logits - logits.max())[None])
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._random))
