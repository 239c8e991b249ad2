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
        if self._temperature != 1:
            # Differences to the largest logit: divided by a small temperature, logits would overflow.
            logits = (logits - logits.max()).div_(self._temperature)
        shares = logits.softmax(-1)
        if self._top_p < 1:
            self._cut(shares)
        # The first token whose share reaches beyond a random number, if the shares lie one behind the other.
        ends = shares.cumsum(-1)
        at = torch.rand(1, generator=self._random, device=shares.device) * ends[-1]
        return min(int(torch.searchsorted(ends, at, right=True)), len(shares) - 1)

    def _cut(self, shares: Tensor) -> None:
        """Make the shares of unlikely tokens zero, which have ``1 - top_p`` together at most."""
        # Tokens below this are among them, however many they are, and need not be sorted: there are very many.
        least = (1 - self._top_p) / len(shares)
        likely = (shares >= least).nonzero()[:, 0]
        rising, order = shares[likely].sort()
        unlikely = rising.cumsum(-1) + shares.where(shares < least, 0).sum() <= 1 - self._top_p
        unlikely[-1] = False
        kept = likely[order[~unlikely]]
        found = shares[kept]
        shares.zero_()[kept] = found
