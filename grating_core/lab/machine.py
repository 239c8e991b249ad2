"""Costs say what a model takes on a machine: measured on this one, or worked out from a few numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from grating_core.arguments import parse_size
from grating_core.columns.companion import KINDS
from grating_core.columns.disk import Disk, fit_gap, fit_reach
from grating_core.lab.shape import Shape
from grating_core.memory.checkpoint import SECTOR


@dataclass(frozen=True)
class ColumnCosts:
    """This class says how many seconds a product with columns of one kind takes for one token.

    Attributes:
        held: Multiplying a column that is in memory.
        arriving: Multiplying a column that was read.
        starting: Preparing reads, if any column is missing.
    """

    held: float
    arriving: float
    starting: float = 0.0


@dataclass(frozen=True)
class Costs:
    """This class says how many seconds the parts of a model take for one token on a machine.

    Attributes:
        bandwidth: Bytes a second at which layers are streamed, one after another.
        latency: Seconds until the first of several parallel reads has come.
        each: Seconds that each of several parallel reads adds.
        byte: Seconds that each of their bytes adds.
        disk: What reads of columns cost.
        sector: Bytes of a sector of the disk.
        outside: What is around the layers: embedding, head, and picking the next token.
        outside_pruned: The same, if the MLPs are pruned.
        layer: A layer in memory.
        streamed: A layer that was streamed.
        pruned: A layer in memory without the columns of its MLP, but with choosing them.
        pruned_streamed: The same of a layer that was streamed. Reading columns leaves the disk no time to do so.
        columns: The columns of each kind, in the order of ``KINDS``.
    """

    bandwidth: float
    latency: float
    each: float
    byte: float
    disk: Disk
    sector: int
    outside: float
    outside_pruned: float
    layer: float
    streamed: float
    pruned: float
    pruned_streamed: float
    columns: tuple[ColumnCosts, ColumnCosts]


@dataclass(frozen=True)
class Machine:
    """This class describes a machine by a few numbers. Its processor takes time only to read memory.

    Attributes:
        disk_bandwidth: Bytes a second of long reads.
        disk_reads: Random reads of 4,096 bytes in a second, with eight at the same time.
        memory_bandwidth: Bytes a second that the processor reads from memory.
        latency: Seconds that a single small read takes.

    Raises:
        ValueError: A number is not above 0.
    """

    disk_bandwidth: float
    disk_reads: float
    memory_bandwidth: float
    latency: float = 0.0

    def __post_init__(self) -> None:
        for name in ("disk_bandwidth", "disk_reads", "memory_bandwidth"):
            if not (number := getattr(self, name)) > 0:
                raise ValueError(f"{name}={number!r} must be above 0")

    def costs(self, shape: Shape) -> Costs:
        """Return the costs of a model on this machine."""
        # No disk is faster at small reads than at long ones, even if the numbers say so.
        small = max(1 / self.disk_reads, SECTOR / self.disk_bandwidth)
        layer, pruned = (max(form.sizes.layers) / self.memory_bandwidth for form in (shape.dense, shape.pruned))
        rows = [shape.columns.row_bytes(kind) / self.memory_bandwidth for kind in KINDS]
        inputs, products = (ColumnCosts(row, row) for row in rows)
        outside = shape.head / self.memory_bandwidth
        gap = fit_gap(small, SECTOR, self.disk_bandwidth)
        return Costs(
            bandwidth=self.disk_bandwidth,
            latency=self.latency,
            each=small - SECTOR / self.disk_bandwidth,
            byte=1 / self.disk_bandwidth,
            disk=Disk(gap, gap, fit_reach(self.disk_bandwidth)),
            sector=SECTOR,
            outside=outside,
            outside_pruned=outside,
            layer=layer,
            streamed=layer,
            pruned=pruned,
            pruned_streamed=pruned + max(shape.pruned.sizes.bytes_read) / self.disk_bandwidth,
            columns=(inputs, products),
        )


def parse_rate(rate: str, name: str) -> float:
    """Return the bytes a second of a rate such as ``"500MB/s"``.

    Args:
        rate: The rate.
        name: Name of the argument in an error.

    Raises:
        ValueError: The string is not a rate.
    """
    try:
        return float(parse_size(rate.strip().removesuffix("/s")))
    except ValueError:
        raise ValueError(f"{name}={rate!r} must be bytes a second, such as '500MB/s'") from None


# These are round numbers from data sheets and the widths of buses. Data sheets give random reads with 32 or more
# at the same time. With eight, a disk reaches at most 8 / (latency of one read).
MACHINES: Mapping[str, Machine] = {
    # UFS 3.1: two lanes of 11.6 Gb/s carry 2.3 GB/s, and data sheets have up to 2.1. One read takes about 0.15 ms,
    # so that eight give 53,000 a second at most. LPDDR5 at 64 bits has 51 GB/s, of which the cores get about half.
    "phone": Machine(2.0e9, 50_000, 25e9, latency=150e-6),
    # SATA at 6 Gb/s carries 0.6 GB/s, and disks give 0.55. One read takes about 0.08 ms, so that eight give
    # 100,000 a second at most, which data sheets have with 32. Two channels of DDR4-3200 have 51 GB/s.
    "sata-ssd": Machine(0.55e9, 60_000, 30e9, latency=80e-6),
    # PCIe 3.0 with four lanes carries 3.9 GB/s, and disks give 3.5. One read takes about 0.05 ms, so that eight
    # give 160,000 a second at most. The memory is the same.
    "nvme": Machine(3.5e9, 140_000, 30e9, latency=50e-6),
}


def find_machine(name: str) -> Machine:
    """Return one of :data:`MACHINES` by its name.

    Raises:
        ValueError: The name is unknown.
    """
    if name not in MACHINES:
        raise ValueError(f"machine={name!r} is unknown; use 'this', {', '.join(map(repr, MACHINES))}")
    return MACHINES[name]
