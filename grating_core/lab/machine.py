"""The simulator needs the speed of a machine's disk, memory and processor: known, described or measured."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch.nn.functional import linear
from transformers import LlamaConfig, LlamaModel

from grating_core.arguments import parse_size
from grating_core.columns.cache import ColumnCache
from grating_core.columns.reading import READERS, fit_gap
from grating_core.errors import StorageError
from grating_core.files.locks import locked, unfinished
from grating_core.files.places import cache_directory, storing
from grating_core.files.writing import reserve
from grating_core.kernels.choice import kernels
from grating_core.kernels.columns import RowFormat
from grating_core.memory.checkpoint import SECTOR, aligned_buffer
from grating_core.memory.pieces import Pieces

_LONG_READ = 4_000_000  # bytes; longer reads are not faster
_FILE = 256 << 20  # bytes; more than the caches inside most disks
_SIZES = (4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20)  # bytes of a read
_LONG = (1 << 20, 4 << 20)
_WEIGHTS = 128 << 20  # bytes; more than a processor's caches hold
_ROWS = (4 << 10, 16 << 10, 64 << 10)  # bytes of a column
_CHOICES = (512, 2048, 8192, 16384)  # columns to choose from
_ROUNDS = 5


@dataclass(frozen=True)
class Costs:
    """This class gives costs in seconds by size, interpolated between known sizes, and in proportion beyond.

    Attributes:
        points: Pairs of a known size and its seconds, by rising size.
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
    """This class holds the speeds of a machine that generates text.

    Attributes:
        disk_bandwidth: Bytes a second of long reads, one after another.
        read: Seconds that one of many parallel reads adds, by its bytes.
        latency: Seconds that a single small read takes.
        memory_bandwidth: Bytes of weights that a dense product reads in a second.
        column: Seconds that a product takes for one column, by the column's bytes.
        choosing: Seconds that choosing columns takes for one token, by the number of columns to choose from.
        layer: Seconds of a layer that do not depend on its size.
    """

    disk_bandwidth: float
    read: Costs
    latency: float
    memory_bandwidth: float
    column: Costs
    choosing: Costs
    layer: float

    @property
    def gap(self) -> int:
        """The longest gap between two columns, in bytes, that is read through."""
        return fit_gap(float(self.read(SECTOR)), self.disk_bandwidth)

    def reading(self, sizes: NDArray[np.int64]) -> float:
        """Return the seconds that parallel reads of these sizes in bytes take together."""
        return max(self.latency, float(self.read(sizes).sum())) if len(sizes) else 0.0


def describe_machine(
    disk_bandwidth: float, disk_reads: float, memory_bandwidth: float, *, latency: float = 0.0
) -> Machine:
    """Describe a machine by a few numbers. Its processor takes time only to read memory.

    Args:
        disk_bandwidth: Bytes a second of long reads.
        disk_reads: Random reads of 4,096 bytes in a second, with eight at the same time.
        memory_bandwidth: Bytes a second that the processor reads from memory.
        latency: Seconds that a single small read takes.

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
        # No disk is faster at small reads than at long ones, even if the numbers say so.
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
    "phone": describe_machine(2.0e9, 50_000, 25e9, latency=150e-6),
    # SATA at 6 Gb/s carries 0.6 GB/s, and disks give 0.55. One read takes about 0.08 ms, so that eight give
    # 100,000 a second at most, which data sheets have with 32. Two channels of DDR4-3200 have 51 GB/s.
    "sata-ssd": describe_machine(0.55e9, 60_000, 30e9, latency=80e-6),
    # PCIe 3.0 with four lanes carries 3.9 GB/s, and disks give 3.5. One read takes about 0.05 ms, so that eight
    # give 160,000 a second at most. The memory is the same.
    "nvme": describe_machine(3.5e9, 140_000, 30e9, latency=50e-6),
}


def probe(directory: Path, dtype: torch.dtype, bits: int | None = None) -> Machine:
    """Measure disk, memory and processor for about ten seconds. Nothing else should run meanwhile.

    Args:
        directory: A directory on the disk to measure. 256 MB are written there and removed.
        dtype: Dtype of the states, and of weights that are not quantised.
        bits: Bits of quantised columns, 8 or 4; None for columns in the dtype.

    Raises:
        StorageError: The disk has no room, or cannot be read past the page cache.
    """
    with _written(directory) as file:
        points = [(size, _seconds_of_read(file, size, READERS)) for size in _SIZES]
        latency = _seconds_of_read(file, SECTOR, 1)
        bandwidth = max(_bandwidth(file, size) for size in _LONG)
    return Machine(
        disk_bandwidth=bandwidth,
        read=Costs(tuple(points)),
        latency=latency,
        memory_bandwidth=_dense_bandwidth(dtype),
        column=Costs(tuple((size, _seconds_of_column(size, dtype, bits)) for size in _ROWS)),
        choosing=Costs(tuple((count, _seconds_of_choice(count)) for count in _CHOICES)),
        layer=_seconds_of_layer(),
    )


def find_machine(name: str, dtype: torch.dtype, bits: int | None = None) -> Machine:
    """Return a machine by its name: ``"this"``, which is measured now, or one of :data:`MACHINES`.

    Args:
        name: Name of the machine.
        dtype: Dtype of the states, and of weights that are not quantised.
        bits: Bits of quantised columns, 8 or 4; None for columns in the dtype.

    Raises:
        ValueError: The name is unknown.
        StorageError: The disk has no room, or cannot be read past the page cache.
    """
    if name == "this":
        return probe(cache_directory(), dtype, bits)
    if name not in MACHINES:
        raise ValueError(f"machine={name!r} is unknown; use 'this', {', '.join(map(repr, MACHINES))}")
    return MACHINES[name]


@contextmanager
def _written(directory: Path) -> Iterator[int]:
    """Yield the descriptor of a large file that is read past the page cache."""
    path = directory / "probe"
    with locked(path), storing(path, _FILE):
        place = unfinished(path)
        with place.open("xb") as file:
            try:
                descriptor = os.open(place, os.O_RDONLY | os.O_DIRECT)
            except (OSError, AttributeError) as error:
                raise StorageError(
                    f"the disk of {directory} cannot be measured, because it cannot be read past the page cache "
                    f"({error}): name a machine, or describe one"
                ) from error
            finally:
                place.unlink()  # a file without a name leaves nothing behind, even after a crash
            try:
                reserve(file, directory, _FILE)
                block = np.random.default_rng(0).bytes(_FILE // 16)  # some disks do not store zeros
                for _ in range(16):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
                yield descriptor
            finally:
                os.close(descriptor)


def _seconds_of_read(file: int, size: int, threads: int) -> float:
    """Measure the seconds that a read at a random place adds, with ``threads`` reads at the same time."""
    each = max(8, min(125, (32 << 20) // size // threads))
    chance = random.Random(size)

    def read(places: list[int]) -> None:
        memory = aligned_buffer(size).numpy()
        count = len(places)
        pieces = Pieces(np.array(places), np.full(count, size), memory, np.zeros(count, dtype=np.int64))
        for place in places[kernels().read_pieces(file, pieces) :]:
            os.preadv(file, [memoryview(memory)], place)  # type: ignore[arg-type]

    with ThreadPoolExecutor(threads) as readers:

        def read_all() -> None:
            places = [[chance.randrange(_FILE // size) * size for _ in range(each)] for _ in range(threads)]
            list(readers.map(read, places))

        # The first round, which starts the threads, does not count.
        return _median(read_all) / (each * threads)


def _bandwidth(file: int, size: int) -> float:
    """Measure the bytes a second of reads, one after another."""
    view = memoryview(aligned_buffer(size).numpy())  # type: ignore[arg-type]
    started = perf_counter()
    for place in range(0, _FILE, size):
        os.preadv(file, [view], place)
    return _FILE / (perf_counter() - started)


def _dense_bandwidth(dtype: torch.dtype) -> float:
    """Measure the bytes of weights that products of single tokens read in a second."""
    width = 2048
    matrices = torch.ones(_WEIGHTS // (width * width * dtype.itemsize), width, width, dtype=dtype)
    token = torch.ones(1, width, dtype=dtype)
    return matrices.nbytes / _median(lambda: [linear(token, matrix) for matrix in matrices])


def _seconds_of_column(size: int, dtype: torch.dtype, bits: int | None) -> float:
    """Measure the seconds for one of many columns that are multiplied together, as in the engine."""
    weights = size // dtype.itemsize if bits is None else size * 8 // (bits + 0.5)
    form = RowFormat(int(weights), dtype, bits)
    table = torch.zeros(_WEIGHTS, dtype=torch.uint8)
    places = np.random.default_rng(0).permutation(_WEIGHTS // form.row_bytes) * form.row_bytes
    places = places[: len(places) // 2]
    values, output = np.ones(len(places), dtype=np.float32), torch.zeros(form.length)
    return _median(lambda: kernels().add_columns(form, table, places, values, output)) / len(places)


def _seconds_of_choice(count: int) -> float:
    """Measure the seconds of choosing half of ``count`` columns, half of which are in memory."""
    cache = ColumnCache(count, count // 2, preference=0.5)
    tokens = np.abs(np.random.default_rng(0).normal(size=(20, count))).astype(np.float32)
    return _median(lambda: [cache.choose(token, count // 2) for token in tokens]) / len(tokens)


@torch.inference_mode()
def _seconds_of_layer() -> float:
    """Measure the seconds for one token of a layer that is so small that its weights do not matter."""
    sizes: dict[str, Any] = {"vocab_size": 8, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    shallow, deep = (LlamaModel(LlamaConfig(**sizes, num_hidden_layers=depth)) for depth in (1, 9))
    token = torch.zeros(1, 1, dtype=torch.int64)
    return max(0.0, (_median(lambda: deep(token)) - _median(lambda: shallow(token))) / 8)


def _median(work: Callable[[], object]) -> float:
    """Return the median seconds of several rounds after a warm-up."""
    seconds = []
    for _ in range(1 + _ROUNDS):
        started = perf_counter()
        work()
        seconds.append(perf_counter() - started)
    return median(seconds[1:])
