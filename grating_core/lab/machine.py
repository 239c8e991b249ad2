"""The speed of a machine's disk, memory and processor, as far as the simulator asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from accelerate.utils import convert_file_size_to_int
from numpy.typing import ArrayLike, NDArray

from grating_core.memory.checkpoint import SECTOR

_LONG_READ = 4_000_000  # bytes; from there on a disk is as fast as it gets


@dataclass(frozen=True)
class Costs:
    """A cost in seconds by size, interpolated between known sizes, and in proportion beyond the largest.

    Attributes:
        points: Known sizes, rising, each with its seconds.
    """

    points: tuple[tuple[float, float], ...]

    def __call__(self, sizes: ArrayLike) -> NDArray[np.float64]:
        """Return the seconds for each size, float64 of the same shape."""
        known, seconds = zip(*self.points, strict=True)
        asked = np.asarray(sizes, dtype=np.float64)
        found: NDArray[np.float64] = np.interp(asked, known, seconds) * np.maximum(1, asked / known[-1])
        return found


@dataclass(frozen=True)
class Machine:
    """A machine that generates text.

    Attributes:
        disk_bandwidth: Bytes a second of long reads, one after the other.
        read: Seconds that each of many reads adds while others are under way, by its bytes.
        latency: Seconds from asking for a single small read to having it.
        memory_bandwidth: Bytes of weights a second that a dense product takes in.
        column: Seconds that a product takes for one column, by its bytes.
        choosing: Seconds that choosing columns takes for one token, by the number there is to choose from.
        layer: Seconds of a layer that do not depend on its size.
    """

    disk_bandwidth: float
    read: Costs
    latency: float
    memory_bandwidth: float
    column: Costs
    choosing: Costs
    layer: float

    def reading(self, sizes: NDArray[np.int64]) -> float:
        """Return the seconds that reads of these sizes in bytes take, all asked for at once."""
        return max(self.latency, float(self.read(sizes).sum())) if len(sizes) else 0.0


def describe_machine(
    disk_bandwidth: float, disk_reads: float, memory_bandwidth: float, *, latency: float = 0.0
) -> Machine:
    """Describe a machine by a few numbers. Its processor takes no time but for reading memory.

    Args:
        disk_bandwidth: Bytes a second of long reads.
        disk_reads: Number of random reads of 4,096 bytes a second, eight under way.
        memory_bandwidth: Bytes a second that the processor reads.
        latency: Seconds of a single small read.

    Raises:
        ValueError: A number is not above 0.
    """
    numbers = {"disk_bandwidth": disk_bandwidth, "disk_reads": disk_reads, "memory_bandwidth": memory_bandwidth}
    for name, number in numbers.items():
        if not number > 0:
            raise ValueError(f"{name}={number!r} must be above 0")
    small, long = 1 / disk_reads, _LONG_READ / disk_bandwidth
    return Machine(
        disk_bandwidth=disk_bandwidth,
        # No disk is faster at small reads than at long ones, whatever two numbers say.
        read=Costs(((SECTOR, max(small, SECTOR / disk_bandwidth)), (_LONG_READ, max(long, small)))),
        latency=latency,
        memory_bandwidth=memory_bandwidth,
        column=Costs(((SECTOR, SECTOR / memory_bandwidth),)),
        choosing=Costs(((1, 0.0),)),
        layer=0.0,
    )


def parse_rate(rate: str, name: str) -> float:
    """Return the bytes a second of a rate such as ``"500MB/s"``.

    Args:
        rate: The rate.
        name: Name of the argument in an error.

    Raises:
        ValueError: It is no rate.
    """
    try:
        return float(convert_file_size_to_int(rate.strip().removesuffix("/s").upper()))
    except ValueError:
        raise ValueError(f"{name}={rate!r} must be bytes a second, such as '500MB/s'") from None


# Round numbers from data sheets and the widths of buses. Makers give random reads with 32 or more under way; with
# eight, a disk gives at most 8 / (latency of one).
MACHINES: Mapping[str, Machine] = {
    # UFS 3.1: two lanes of 11.6 Gb/s carry 2.3 GB/s, and data sheets have up to 2.1. One read takes about 0.15 ms,
    # so that eight give 53,000 a second at most. LPDDR5 at 64 bits has 51 GB/s, of which the cores get about half.
    "phone": describe_machine(2.0e9, 50_000, 25e9, latency=150e-6),
    # SATA at 6 Gb/s carries 0.6 GB/s, and disks give 0.55. One read takes about 0.08 ms, so that eight give
    # 100,000 a second at most, which data sheets have with 32. Two channels of DDR4-3200 have 51 GB/s.
    "sata-ssd": describe_machine(0.55e9, 60_000, 30e9, latency=80e-6),
    # PCIe 3.0 with four lanes carries 3.9 GB/s, and disks give 3.5. One read takes about 0.05 ms, so that eight
    # give 160,000 a second at most. The same memory.
    "nvme": describe_machine(3.5e9, 140_000, 30e9, latency=50e-6),
}
