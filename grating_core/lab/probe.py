"""Measurements of this machine, as far as the simulator asks."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch.nn.functional import embedding_bag, linear
from transformers import LlamaConfig, LlamaModel

from grating_core.columns.cache import ColumnCache
from grating_core.columns.companion import READERS
from grating_core.errors import StorageError
from grating_core.files.locks import locked, unfinished
from grating_core.files.places import cache_directory, storing
from grating_core.files.writing import reserve
from grating_core.lab.machine import MACHINES, Costs, Machine
from grating_core.memory.checkpoint import SECTOR, aligned_buffer

_FILE = 256 << 20  # bytes; more than most disks cache for themselves
_SIZES = (4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20)  # of reads
_LONG = (1 << 20, 4 << 20)
_WEIGHTS = 128 << 20  # bytes; more than a processor's caches hold
_ROWS = (4 << 10, 16 << 10, 64 << 10)  # bytes of a column
_CHOICES = (512, 2048, 8192, 16384)  # columns to choose from
_ROUNDS = 5


def probe(directory: Path, dtype: torch.dtype) -> Machine:
    """Measure disk, memory and processor. It takes about ten seconds; nothing else should run meanwhile.

    Args:
        directory: A directory on the disk to measure. 256 MB are written there and removed.
        dtype: Type of the weights.

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
        column=Costs(tuple((size, _seconds_of_column(size, dtype)) for size in _ROWS)),
        choosing=Costs(tuple((count, _seconds_of_choice(count)) for count in _CHOICES)),
        layer=_seconds_of_layer(),
    )


def find_machine(name: str, dtype: torch.dtype) -> Machine:
    """Return a machine by its name: ``"this"``, which is measured now, or one of :data:`MACHINES`.

    Args:
        name: Name of the machine.
        dtype: Type of the weights.

    Raises:
        ValueError: The name is unknown.
        StorageError: The disk has no room, or cannot be read past the page cache.
    """
    if name == "this":
        return probe(cache_directory(), dtype)
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
                    f"the disk of {directory} cannot be measured, since it has no reads past the page cache "
                    f"({error}): name a machine, or describe one"
                ) from error
            finally:
                place.unlink()  # so that nothing is left of it whatever happens
            try:
                reserve(file, directory, _FILE)
                block = np.random.default_rng(0).bytes(_FILE // 16)  # not zeros, which some disks do not store
                for _ in range(16):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
                yield descriptor
            finally:
                os.close(descriptor)


def _seconds_of_read(file: int, size: int, threads: int) -> float:
    """Measure the seconds that a read at a random place adds, with so many under way."""
    each = max(8, min(250, (64 << 20) // size // threads))
    chance = random.Random(size)

    def read(places: list[int]) -> None:
        view = memoryview(aligned_buffer(size).numpy())  # type: ignore[arg-type]
        for place in places:
            os.preadv(file, [view], place)

    places = [[chance.randrange(_FILE // size) * size for _ in range(each)] for _ in range(threads)]
    with ThreadPoolExecutor(threads) as readers:
        started = perf_counter()
        list(readers.map(read, places))
        return (perf_counter() - started) / (each * threads)


def _bandwidth(file: int, size: int) -> float:
    """Measure the bytes a second of reads one after the other."""
    view = memoryview(aligned_buffer(size).numpy())  # type: ignore[arg-type]
    started = perf_counter()
    for place in range(0, _FILE, size):
        os.preadv(file, [view], place)
    return _FILE / (perf_counter() - started)


def _dense_bandwidth(dtype: torch.dtype) -> float:
    """Measure the bytes of weights a second that products of single tokens take in."""
    width = 2048
    matrices = torch.ones(_WEIGHTS // (width * width * dtype.itemsize), width, width, dtype=dtype)
    token = torch.ones(1, width, dtype=dtype)
    return matrices.nbytes / _median(lambda: [linear(token, matrix) for matrix in matrices])


def _seconds_of_column(size: int, dtype: torch.dtype) -> float:
    """Measure the seconds of one of many columns that are multiplied together, as the engine does it."""
    table = torch.ones(_WEIGHTS // size, size // dtype.itemsize, dtype=dtype)
    slots = torch.randperm(len(table))[: len(table) // 2]
    values = torch.ones(len(slots), dtype=dtype)
    bags = torch.get_num_threads()
    offsets = torch.arange(bags) * len(slots) // bags
    seconds = _median(lambda: embedding_bag(slots, table, offsets, mode="sum", per_sample_weights=values))
    return seconds / len(slots)


def _seconds_of_choice(count: int) -> float:
    """Measure the seconds of choosing half of so many columns, of which half are in memory."""
    cache = ColumnCache(count, count // 2, preference=0.5)
    tokens = np.abs(np.random.default_rng(0).normal(size=(20, count))).astype(np.float32)
    return _median(lambda: [cache.choose(token, count // 2) for token in tokens]) / len(tokens)


@torch.inference_mode()
def _seconds_of_layer() -> float:
    """Measure the seconds of a layer so small that its weights do not matter, for a token."""
    sizes: dict[str, Any] = {"vocab_size": 8, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    shallow, deep = (LlamaModel(LlamaConfig(**sizes, num_hidden_layers=depth)) for depth in (1, 9))
    token = torch.zeros(1, 1, dtype=torch.int64)
    return max(0.0, (_median(lambda: deep(token)) - _median(lambda: shallow(token))) / 8)


def _median(work: Callable[[], object]) -> float:
    """Return the median seconds of some rounds after a warm-up."""
    seconds = []
    for _ in range(1 + _ROUNDS):
        started = perf_counter()
        work()
        seconds.append(perf_counter() - started)
    return median(seconds[1:])
