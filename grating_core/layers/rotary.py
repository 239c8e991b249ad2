"""Rotary positions (RoFormer, arXiv 2104.09864): tables of angles, and turning by them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grating_core.layers.spec import Rotary


class Angles(NamedTuple):
    """This class holds the angles of T tokens.

    Attributes:
        cosine: Cosines of the angles for each entry of a head, so each twice, ``[T, head size]``.
        sine: Sines of the angles for each pair of entries, ``[T, head size / 2]``.
    """

    cosine: Tensor
    sine: Tensor

    def at(self, places: Tensor | slice) -> Angles:
        """Return the angles of some tokens: a slice, or int64 ``[T]``."""
        return Angles(self.cosine[places], self.sine[places])


def angles(rotary: Rotary, positions: Tensor, dtype: torch.dtype) -> Angles:
    """Return the angles at positions, int64 ``[T]``, in the dtype of the states that they turn."""
    frequencies = torch.tensor(rotary.frequencies, dtype=torch.float32, device=positions.device)
    turned = positions[:, None].float() * frequencies
    cosine = (turned.cos() * rotary.scale).to(dtype)
    return Angles(torch.cat((cosine, cosine), -1), (turned.sin() * rotary.scale).to(dtype))


def rotated(states: Tensor, by: Angles) -> Tensor:
    """Return states ``[heads, T, head size]`` turned by the angles of their T tokens.

    Entry i of the first half of a head and entry i of its second half are a pair.
    """
    half = by.sine.shape[-1]
    output = states * by.cosine
    output[..., :half].addcmul_(states[..., half:], by.sine, value=-1)
    output[..., half:].addcmul_(states[..., :half], by.sine)
    return output
