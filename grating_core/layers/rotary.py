"""Rotary positions (RoFormer, arXiv 2104.09864): tables of angles, and turning by them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grating_core.layers.spec import Rotary


class Angles(NamedTuple):
    """This class holds the cosines and sines of the angles of T tokens, ``[T, head size / 2]`` each."""

    cosine: Tensor
    sine: Tensor

    def at(self, places: Tensor | slice) -> Angles:
        """Return the angles of some tokens: a slice, or int64 ``[T]``."""
        return Angles(self.cosine[places], self.sine[places])


def angles(rotary: Rotary, positions: Tensor, dtype: torch.dtype) -> Angles:
    """Return the angles at positions, int64 ``[T]``, in the dtype of the states that they turn."""
    frequencies = torch.tensor(rotary.frequencies, dtype=torch.float32, device=positions.device)
    turned = positions[:, None].float() * frequencies
    return Angles((turned.cos() * rotary.scale).to(dtype), (turned.sin() * rotary.scale).to(dtype))


def rotated(states: Tensor, by: Angles) -> Tensor:
    """Return states ``[heads, T, head size]`` turned by the angles of their T tokens.

    Entry i of the first half of a head and entry i of its second half are a pair.
    """
    first, second = states.chunk(2, dim=-1)
    output = torch.empty_like(states)
    half = first.shape[-1]
    torch.mul(first, by.cosine, out=output[..., :half]).addcmul_(second, by.sine, value=-1)
    torch.mul(second, by.cosine, out=output[..., half:]).addcmul_(first, by.sine)
    return output
