"""A sampler picks the next token from the logits of all tokens."""

from __future__ import annotations

import torch
from torch import Tensor


class Sampler:
    """A sampler picks the likeliest token, or a token at random by the model's probabilities.

    Args:
        temperature: Divisor of the logits; 0 for the likeliest token always.
        top_p: Probability that the tokens to pick from have together, the likeliest first (nucleus sampling, arXiv
            1904.09751).
        seed: Seed of the random numbers; None for other numbers every time.
        device: Device of the logits.
    """

    def __init__(self, temperature: float, top_p: float, seed: int | None, device: torch.device) -> None:
        self._temperature = float(temperature)
        self._top_p = float(top_p)
        self._random = torch.Generator(device)
        if seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(int(seed))

    def pick(self, logits: Tensor) -> int:
        """Pick the next token from float32 logits ``[V]``."""
        if self._temperature == 0:
            return int(logits.argmax())
        # Differences to the largest logit: divided by a small temperature, logits would overflow.
        scores = (logits - logits.max()) / self._temperature
        if self._top_p < 1:
            rising, tokens = scores.sort()
            unlikely = rising.softmax(-1).cumsum(-1) <= 1 - self._top_p
            unlikely[-1] = False
            scores[tokens[unlikely]] = -torch.inf
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._random))
