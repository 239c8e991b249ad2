"""Rotary positions (RoFormer, arXiv 2104.09864): frequencies, tables of angles, and turning by them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from grating_core.layers.sending import sent
from grating_core.layers.spec import Rotary


class Angles(NamedTuple):
    """This class holds the angles of T tokens, one for each pair of entries of a head.

    Attributes:
        cosine: Cosines of the angles, ``[T, head size / 2]``.
        sine: Sines of the angles, of the same shape.
    """

    cosine: Tensor
    sine: Tensor

    def at(self, places: Tensor | slice) -> Angles:
        """Return the angles of some tokens: a slice, or int64 ``[T]``."""
        return Angles(self.cosine[places], self.sine[places])


def angles(rotary: Rotary, positions: Tensor, dtype: torch.dtype) -> Angles:
    """Return the angles at positions, int64 ``[T]``, in the dtype of the states that they turn."""
    frequencies = sent(torch.tensor(rotary.frequencies, dtype=torch.float32), positions.device)
    turned = positions[:, None].float() * frequencies
    return Angles((turned.cos() * rotary.scale).to(dtype), (turned.sin() * rotary.scale).to(dtype))


def rotated(states: Tensor, by: Angles) -> Tensor:
    """Return states ``[T, heads, head size]`` turned by the angles of their T tokens.

    Entry i of the first half of a head and entry i of its second half are a pair.
    """
    half = by.sine.shape[-1]
    output = (states.view(*states.shape[:-1], 2, half) * by.cosine[:, None, None]).flatten(-2)
    sine = by.sine[:, None]
    output[..., :half].addcmul_(states[..., half:], sine, value=-1)
    output[..., half:].addcmul_(states[..., :half], sine)
    return output


# Frequencies are computed in float32, operation by operation as transformers does: checkpoints were trained with
# these very numbers.
def frequencies(size: int, theta: float) -> Tensor:
    """Return the frequencies of a head of some size, float32 ``[size / 2]``."""
    return 1.0 / (theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size))


def plain(size: int, theta: float) -> Rotary:
    """Return rotary positions without a scaling."""
    return _made(frequencies(size, theta))


def linear(size: int, theta: float, *, factor: float) -> Rotary:
    """Return rotary positions that grow more slowly by a factor (arXiv 2306.15595)."""
    return _made(frequencies(size, theta) / factor)


def ntk(size: int, theta: float, *, factor: float) -> Rotary:
    """Return rotary positions whose long waves turn more slowly by a factor, and short ones hardly.

    The source is equation 6 of https://kexue.fm/archives/9706. A factor of 1 or less changes nothing, as in GTE's
    own code.
    """
    if factor <= 1:
        return plain(size, theta)
    return _made(frequencies(size, theta * factor) / factor ** (2 / size))


def dynamic(size: int, theta: float, *, factor: float, window: int) -> Rotary:
    """Return rotary positions whose frequencies change beyond a window of tokens; grating never goes beyond."""
    # Within the window the theta grows by a power of 1, or of what floating point makes of it.
    one = factor * window / window - (factor - 1)
    return _made(frequencies(size, theta * one ** (size / (size - 2))))


def llama3(size: int, theta: float, *, factor: float, low: float, high: float, window: int) -> Rotary:
    """Return the rotary positions of Llama 3.1, which turns long waves more slowly and leaves short ones alone.

    Args:
        size: Number of entries of a head.
        theta: The base of the frequencies.
        factor: The factor by which long waves turn more slowly.
        low: Waves of more than ``window / low`` tokens are long.
        high: Waves of fewer than ``window / high`` tokens are short.
        window: The window in tokens that the model was first trained with.
    """
    short = frequencies(size, theta)
    lengths = 2 * math.pi / short
    long = torch.where(lengths > window / low, short / factor, short)
    share = (window / lengths - low) / (high - low)
    between = ~(lengths < window / high) & ~(lengths > window / low)
    return _made(torch.where(between, (1 - share) * long / factor + share * long, long))


def yarn(
    size: int,
    theta: float,
    *,
    factor: float,
    window: int,
    fast: float,
    slow: float,
    whole: bool,
    scale: float,
) -> Rotary:
    """Return the rotary positions of YaRN (arXiv 2309.00071, section 3).

    Args:
        size: Number of entries of a head.
        theta: The base of the frequencies.
        factor: The factor by which the slowest pairs turn more slowly.
        window: The window in tokens that the model was first trained with.
        fast: Pairs that turn round more often than this within the window are left alone.
        slow: Pairs that turn round less often than this are slowed down by the whole factor.
        whole: Whether the bounds between these pairs are rounded to whole numbers.
        scale: The factor of the turned entries.
    """
    low, high = (size * math.log(window / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (fast, slow))
    if whole:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001
    ramp = torch.clamp((torch.arange(size // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    powers = theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    left = 1 - ramp
    return _made(1.0 / (factor * powers) * (1 - left) + 1.0 / powers * left, scale)


def yarn_scale(factor: float, weight: float = 1.0) -> float:
    """Return the factor of the turned entries that YaRN recommends (arXiv 2309.00071, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def longrope(size: int, theta: float, *, factors: Sequence[float], scale: float) -> Rotary:
    """Return the rotary positions of LongRoPE (arXiv 2402.13753).

    Args:
        size: Number of entries of a head.
        theta: The base of the frequencies.
        factors: The factor by which each pair turns more slowly, ``size / 2`` numbers.
        scale: The factor of the turned entries.
    """
    powers = theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    return _made(1.0 / (torch.tensor(factors, dtype=torch.float32) * powers), scale)


def longrope_scale(factor: float, window: int) -> float:
    """Return the factor of the turned entries that LongRoPE recommends for windows so many times the first one."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(window))


def _made(found: Tensor, scale: float = 1.0) -> Rotary:
    return Rotary(tuple(found.tolist()), scale)
