"""The times of this machine are measured: the engine runs a made-up model of the same widths, and its parts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import mkdtemp
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from grating_core.columns.allocation import allocate
from grating_core.columns.cache import ColumnCache
from grating_core.columns.companion import KINDS, ColumnSizes, Kind
from grating_core.columns.fetching import SLOTS, Fetcher
from grating_core.columns.install import MlpPruning, fetching_bytes, install
from grating_core.columns.masks import kept
from grating_core.columns.mlp import ColumnTable, unpacked_memory
from grating_core.columns.reading import Arrival, Block, ColumnFile
from grating_core.engine.decode import advance, new_cache
from grating_core.engine.sampling import Sampler
from grating_core.files.places import cache_directory, storing
from grating_core.lab.machine import ColumnCosts, Costs
from grating_core.lab.made_up import NAME, make_parts, stream_parts, write_made_up_columns
from grating_core.lab.shape import Shape
from grating_core.memory.checkpoint import SECTOR, aligned_buffer
from grating_core.memory.meter import Meter
from grating_core.memory.pieces import Pieces
from grating_core.models.causal_lm import CausalLM
from grating_core.models.layered import Parts

_WEIGHTS = 256 << 20  # bytes of layers; more than a processor's caches hold, and more than the caches inside disks
_FEWEST = 3  # layers
_ROUNDS = 20
_WARM = 3
_DENSITY = 0.5
_SHARES = (0.1, 0.25, 0.5)  # of the columns that are read
_LONG = 64  # sectors of a long read


def measure(shape: Shape, context: int) -> Costs:
    """Measure the costs of a model on this machine, for some ten seconds. Nothing else should run meanwhile.

    Some hundred MB are written into grating's cache and removed.

    Args:
        shape: Shape of the model.
        context: The number of tokens before the one that is computed.

    Raises:
        StorageError: The disk has no room.
    """
    with _directory() as place:
        depth = min(shape.depth, max(_FEWEST, -(-_WEIGHTS // max(shape.dense.sizes.layers))))
        parts = make_parts(shape, shape.dense, depth)
        layer, outside = _layer_and_outside(parts, context)
        streaming = stream_parts(parts, shape, place / "layers.safetensors")
        with closing(streaming):
            all_streamed = _run(streaming, context)
        columns = shape.columns
        sizes = replace(columns, depth=min(shape.depth, max(_FEWEST, -(-_WEIGHTS // columns.layer_bytes))))
        pruning = _measure_pruning(shape, sizes, place, context)
        return Costs(
            bandwidth=all_streamed.bytes / all_streamed.seconds,
            outside=outside,
            layer=layer,
            streamed=(all_streamed.seconds - all_streamed.waited - outside) / depth,
            **pruning,
        )


def _measure_pruning(shape: Shape, sizes: ColumnSizes, place: Path, context: int) -> dict[str, Any]:
    """Return the costs of pruned MLPs, see :class:`Costs`. Some layers have the sizes that are given."""
    depth, specs, how = sizes.depth, shape.spec.layers[: sizes.depth], MlpPruning(_DENSITY, bits=sizes.bits)
    write_made_up_columns(place / "columns.safetensors", sizes)
    with closing(_CountingFile(place / "columns.safetensors", sizes, NAME)) as file:
        parts = make_parts(shape, shape.pruned, depth, install(specs, file, how, 1.0, Meter())[0])
        layer, outside = _layer_and_outside(parts, context)
        # With no column in memory all are read; and then all layers are streamed as well.
        reading = replace(parts, meter=Meter())
        reading = replace(reading, mlps=install(specs, file, how, 0.0, reading.meter)[0])
        file.reads = 0
        all_read = _run(reading, context)
        reads = file.reads / (_ROUNDS + _WARM)
        streaming = stream_parts(reading, shape, place / "rest.safetensors")
        with closing(streaming):
            all_streamed = _run(streaming, context)
        columns, alone = _columns(file), _reading(file)
        block = fetching_bytes(sizes) // SLOTS
        used = [kept(sizes.count(kind), getattr(allocate(_DENSITY, depth)[-1], kind)) for kind in KINDS]
        layer -= sum(count * costs.held for count, costs in zip(used, columns, strict=True))
        # Beside the threads that compute, reads take longer than alone, and so does what comes before and after.
        beside = (all_read.seconds - all_read.waited - outside) / depth - layer
        beside /= sum(costs.starting + count * costs.arriving for count, costs in zip(used, columns, strict=True))
        inputs, products = (
            ColumnCosts(
                costs.held,
                max(costs.held, beside * costs.arriving),
                max(0.0, beside * costs.starting),
            )
            for kind, costs in zip(KINDS, columns, strict=True)
        )
        # Where all is read, the disk has work until the last columns of a kind have come, which are multiplied
        # then.
        last = sum(
            costs.starting + count * costs.arriving / -(-count * sizes.row_bytes(kind) // block)
            for kind, count, costs in zip(KINDS, used, (inputs, products), strict=True)
        )
        busy = all_read.seconds - outside - depth * (layer + last)
        slower = max(1.0, busy / (2 * depth * alone[0] + reads * alone[1] + all_read.bytes * alone[2]))
        latency, each, byte = (slower * part for part in alone)
        return {
            "latency": latency,
            "each": each,
            "byte": byte,
            "disk": file.measure(),
            "sector": file.sector,
            "outside_pruned": outside,
            "pruned": layer,
            "pruned_streamed": layer + max(0.0, all_streamed.seconds - all_read.seconds) / depth,
            "columns": (inputs, products),
        }


@contextmanager
def _directory() -> Iterator[Path]:
    """Yield a new directory in grating's cache, which is removed."""
    cache = cache_directory()
    with storing(cache):
        cache.mkdir(parents=True, exist_ok=True)
        place = Path(mkdtemp(prefix=".probe-", dir=cache))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


class _Run(NamedTuple):
    """A run is what a token takes: seconds, those of them in which reads are awaited, and bytes that are read."""

    seconds: float
    waited: float
    bytes: float


def _layer_and_outside(parts: Parts, context: int) -> tuple[float, float]:
    """Return the seconds of a layer in memory, and of all else that a token takes."""
    depth = parts.spec.depth
    fewer = {number: parts.layers[number] for number in range(1, depth // 2 + 1)}
    half = replace(parts, layers=fewer, spec=replace(parts.spec, layers=parts.spec.layers[: depth // 2]))
    whole, shorter = (_run(one, context).seconds for one in (parts, half))
    layer = (whole - shorter) / (depth - depth // 2)
    return layer, whole - depth * layer


def _run(parts: Parts, context: int) -> _Run:
    """Run the engine, token by token."""
    model, meter = CausalLM(parts), parts.meter
    cache = new_cache(model, context + _ROUNDS + _WARM)
    for spec, layer in zip(model.spec.layers, cache.layers, strict=True):
        nothing = torch.zeros(context, spec.key_heads, spec.head_size, dtype=model.dtype)
        layer.extend(nothing, nothing)
    sampler = Sampler(1.0, 1.0, 0, model.device)
    found, token = [], 0
    for _ in range(_ROUNDS + _WARM):
        before, started = replace(meter), perf_counter()
        token = sampler.pick(advance(model, [token], cache, slice_tokens=1))
        seconds, used = perf_counter() - started, meter.since(before)
        found.append((seconds, used.seconds_waited, used.bytes_read))
    return _Run(*map(median, zip(*found[_WARM:], strict=True)))


class _CountingFile(ColumnFile):
    """This file counts its reads."""

    reads = 0

    def begin(self, number: int, kind: Kind, block: Block) -> Arrival:
        """See :meth:`ColumnFile.begin`."""
        self.reads += len(block.reads.starts)
        return super().begin(number, kind, block)


def _reading(file: ColumnFile) -> tuple[float, float, float]:
    """Return the seconds of parallel reads: until the first has come, for each, and for each byte."""
    sectors = file.path.stat().st_size // SECTOR
    longest = min(_LONG, sectors // 2)
    memory = aligned_buffer(256 * SECTOR + 32 * longest * SECTOR).numpy()
    chance, found = np.random.default_rng(0), []
    for count, length in ((1, 1), (256, 1), (32, longest)):
        seconds, size = [], length * SECTOR
        for _ in range(_ROUNDS):
            starts = chance.integers(0, sectors - length, count) * SECTOR
            pieces = Pieces(starts, np.full(count, size), memory, np.arange(count) * size)
            started = perf_counter()
            file.begin(1, "inputs", Block(slice(0), starts, pieces)).finish()
            seconds.append(perf_counter() - started)
        found.append(median(seconds))
    latency, small, long = found
    # small = latency + 256 * (each + sector * byte), and long likewise.
    sector = (small - latency) / 256
    byte = max(0.0, (long - latency) / 32 - sector) / ((longest - 1) * SECTOR)
    return latency, max(0.0, sector - SECTOR * byte), byte


def _columns(file: ColumnFile) -> tuple[ColumnCosts, ColumnCosts]:
    """Return the costs of columns of each kind."""
    sizes = file.sizes
    meter, unpacked = Meter(), unpacked_memory(sizes)
    fetcher = Fetcher(file, aligned_buffer(fetching_bytes(sizes)), meter)

    def tables(kind: Kind, resident: int) -> list[ColumnTable]:
        made = []
        for number in range(1, sizes.depth + 1):
            made.append(ColumnTable(fetcher, number, kind, ColumnCache(resident), unpacked, meter))
            made[-1].fill()
        return made

    found = []
    for kind in KINDS:
        count = sizes.count(kind)
        few, many = (kept(count, share) for share in (0.25, 0.75))
        whole = tables(kind, count)
        short, long = (_multiplied(whole, sizes, kind, columns, meter) for columns in (few, many))
        held = (long - short) / (many - few)
        columns = [kept(count, share) for share in _SHARES]
        more = [_multiplied(tables(kind, 0), sizes, kind, each, meter) - (short - few * held) for each in columns]
        arriving, starting = np.polyfit(columns, more, 1)
        found.append(ColumnCosts(held, float(arriving), max(0.0, float(starting))))
    return found[0], found[1]


def _multiplied(
    tables: Sequence[ColumnTable], sizes: ColumnSizes, kind: Kind, columns: int, meter: Meter
) -> float:
    """Return the seconds of a product with the largest of random values, without waiting for reads."""
    chance = torch.Generator().manual_seed(columns)
    seconds = []
    for _ in range(3):
        for table in tables:
            values: Tensor = torch.randn(sizes.count(kind), generator=chance).to(sizes.dtype)
            waited, started = meter.seconds_waited, perf_counter()
            table.multiply(values, columns)
            seconds.append(perf_counter() - started - (meter.seconds_waited - waited))
    return median(seconds)
