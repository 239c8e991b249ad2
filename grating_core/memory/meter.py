"""This module measures bytes, waiting, hits and the memory of the process while a pass runs."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from operator import add, sub

import psutil
import torch

if sys.platform != "win32":
    import resource


_GROWTH = 16_000_000  # bytes that the process may grow by before freed memory is returned to the system


@dataclass
class Meter:
    """A meter keeps running totals of a model. Only the thread that computes adds to them, never one that reads.

    Attributes:
        bytes_read: Bytes of weights and embedding rows taken from the checkpoint.
        bytes_spilled: Bytes of hidden states written to disk.
        seconds_waited: Time that computing stood still for reading and writing.
        rows_wanted: Embedding rows looked up, each counted once a pass.
        rows_read: Looked-up rows that were not in memory.
        columns_wanted: Columns of MLPs that tokens used.
        columns_read: Used columns that were not in memory.
    """

    bytes_read: int = 0
    bytes_spilled: int = 0
    seconds_waited: float = 0.0
    rows_wanted: int = 0
    rows_read: int = 0
    columns_wanted: int = 0
    columns_read: int = 0

    def since(self, before: Meter) -> Meter:
        """Return the difference between these totals and an earlier copy of them."""
        return Meter(*map(sub, vars(self).values(), vars(before).values()))

    def __add__(self, other: Meter) -> Meter:
        """Return the sum of two meters."""
        return Meter(*map(add, vars(self).values(), vars(other).values()))

    @property
    def column_hit_rate(self) -> float | None:
        """The share of the wanted columns that were in memory; None if no column was wanted."""
        return 1 - self.columns_read / self.columns_wanted if self.columns_wanted else None

    @property
    def hit_rate(self) -> float | None:
        """The share of the wanted rows that were in memory; None if no row was wanted."""
        return max(0.0, 1 - self.rows_read / self.rows_wanted) if self.rows_wanted else None


class PeakMemory:
    """This class finds the most memory that the process takes from now on.

    The system keeps one exact peak for the whole life of a process. If that peak does not rise, the answer is the
    most memory at any call of :meth:`look`.

    Args:
        device: The device that computes; on CUDA the answer is torch's own peak there.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = _highest_memory()
        self._seen = self._settled = resident_memory()

    def look(self) -> None:
        """Note the memory that is taken now, and return freed memory of the allocator to the system.

        Intermediate results of different sizes rarely fit where earlier ones were. So each layer uses other parts
        of the heap, and every used part counts as taken until it is returned.
        """
        now = resident_memory()
        self._seen = max(self._seen, now)
        if now > self._settled + _GROWTH:
            return_freed_memory()
            self._settled = resident_memory()

    @property
    def bytes(self) -> int:
        """The peak so far, in bytes."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        highest = _highest_memory()
        return highest if highest > self._before else self._seen


def return_freed_memory() -> None:
    """Return freed memory of the C library's allocator to the system, where the library can."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None:
        trim(0)


def resident_memory() -> int:
    """Return the bytes of this process that are in memory now."""
    return int(psutil.Process().memory_info().rss)


def _highest_memory() -> int:
    """Return the most bytes of this process that were ever in memory."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024
