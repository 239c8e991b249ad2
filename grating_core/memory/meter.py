"""What is counted while a request runs: bytes, waiting, hits, and the memory of the process."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import astuple, dataclass

import psutil
import torch

if sys.platform != "win32":
    import resource


_GROWTH = 16_000_000  # bytes; what the allocator may gather between two looks before it has to give back


@dataclass
class Meter:
    """A meter keeps running totals of a model. The thread that computes adds to them, never one that reads.

    Attributes:
        bytes_read: Bytes of weights and embedding rows taken from the checkpoint.
        bytes_spilled: Bytes of hidden states written to disk.
        seconds_waited: Time that computing stood still for reading and writing.
        rows_wanted: Embedding rows looked up, each counted once a request.
        rows_read: Those that were not in memory.
        columns_wanted: Columns of MLPs that tokens used.
        columns_read: Those of them that were not in memory.
    """

    bytes_read: int = 0
    bytes_spilled: int = 0
    seconds_waited: float = 0.0
    rows_wanted: int = 0
    rows_read: int = 0
    columns_wanted: int = 0
    columns_read: int = 0

    def since(self, before: Meter) -> Meter:
        """Return what has been added since a copy of these totals was taken."""
        return Meter(*(now - then for now, then in zip(astuple(self), astuple(before), strict=True)))

    @property
    def column_hit_rate(self) -> float | None:
        """Return the share of the wanted columns that were in memory; None if none was wanted."""
        return 1 - self.columns_read / self.columns_wanted if self.columns_wanted else None

    @property
    def hit_rate(self) -> float | None:
        """Return the share of the wanted rows that were in memory; None if none was looked up."""
        return max(0.0, 1 - self.rows_read / self.rows_wanted) if self.rows_wanted else None


class PeakMemory:
    """This finds the most memory that a process takes while something runs.

    The system keeps one peak for the life of a process. It is exact, and tells about this time only if it rose;
    otherwise the answer is the most that was seen when :meth:`look` was called.

    Args:
        device: The device that computes; on CUDA the answer is torch's own peak there.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = _highest_memory()
        self._seen = self._settled = resident_memory()

    def look(self) -> None:
        """See how much memory is taken now, and return to the system what the allocator holds for nothing.

        Intermediate results of uneven sizes never fit quite where those before them were. Layer by layer they
        wander through the heap, and all that they have ever touched counts as taken, until it is given back.
        """
        now = resident_memory()
        self._seen = max(self._seen, now)
        if now > self._settled + _GROWTH:
            # Where the C library has a way to.
            if trim := getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None:
                trim(0)
            self._settled = resident_memory()

    @property
    def bytes(self) -> int:
        """Return the peak so far, in bytes."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        highest = _highest_memory()
        return highest if highest > self._before else self._seen


def resident_memory() -> int:
    """Return the bytes of this process that are in memory now."""
    return int(psutil.Process().memory_info().rss)


def _highest_memory() -> int:
    """Return the most bytes of this process that were ever in memory."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024
