"""Tensors go from the CPU to the device that computes, without waiting for what the device has still to do."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the CPU on a device.

    CUDA copies from ordinary memory only after all work that it was given. From pinned memory the copy waits in
    line, and the CPU goes on.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def integers(numbers: Iterable[int]) -> Tensor:
    """Return integers as int64 on the CPU. Torch alone is slower with a list, up to nine times."""
    found = array("q", numbers)
    return torch.frombuffer(found, dtype=torch.int64) if found else torch.empty(0, dtype=torch.int64)


def numbers_of(runs: Sequence[slice]) -> Tensor:
    """Return all numbers of runs of numbers, one run behind the other: int64 on the CPU."""
    lengths = integers(run.stop - run.start for run in runs)
    ends = lengths.cumsum(0)
    shifts = integers(run.start for run in runs) - (ends - lengths)
    total = int(ends[-1]) if len(runs) else 0
    return torch.arange(total) + shifts.repeat_interleave(lengths, output_size=total)
