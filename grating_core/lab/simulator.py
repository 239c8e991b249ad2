"""This module simulates the speed of a model larger than memory: activations and caches are real, time is not.

It compares three ways with the same bytes in memory. Dense streaming streams whole layers. DIP has caches of
columns, which evict the least used columns. Cache-aware DIP prefers columns that are in memory. As in the engine,
a :class:`ColumnCache` says which columns are chosen, found and read; only seconds are estimated. Buffers for
reading, and the keys and values of the context, come on top of the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from grating_core.arguments import parse_size
from grating_core.columns.cache import Caching, Preference
from grating_core.columns.companion import KINDS, ColumnSizes, Kind
from grating_core.columns.install import PREFERENCE
from grating_core.columns.masks import Shares, kept
from grating_core.columns.reading import find_sectors
from grating_core.lab.activations import Activations, Magnitudes
from grating_core.lab.decoders import empty_decoder
from grating_core.lab.machine import Machine
from grating_core.lab.quality import Traffic

DENSE, DIP, CACHE_AWARE = WAYS = ("dense streaming", "DIP", "cache-aware DIP")


@dataclass(frozen=True)
class Shape:
    """A shape holds the sizes of a model.

    Attributes:
        columns: Sizes of the MLPs.
        attention: Bytes of a layer's weights outside the MLP.
        outside: Bytes of weights outside the layers, which are always in memory.
        head: Bytes of those outside weights that multiply every token.
    """

    columns: ColumnSizes
    attention: int
    outside: int
    head: int

    @classmethod
    def of(cls, directory: Path, dtype: torch.dtype) -> Shape:
        """Find the shape of a model, from its ``config.json`` alone.

        Args:
            directory: Directory of the file.
            dtype: Dtype of the weights.

        Raises:
            ModelNotFoundError: The file is missing or makes no sense.
            UnsupportedModelError: The model is not a decoder with gated MLPs.
        """
        model = empty_decoder(directory)
        layers = model.model.layers
        mlp = layers[0].mlp
        width, products = mlp.down_proj.out_features, mlp.down_proj.in_features
        layer = sum(weight.numel() for weight in layers[0].parameters())
        everything = sum(weight.numel() for weight in model.parameters())
        return cls(
            ColumnSizes(len(layers), width, products, dtype),
            attention=(layer - 3 * width * products) * dtype.itemsize,
            outside=(everything - len(layers) * layer) * dtype.itemsize,
            head=model.lm_head.weight.numel() * dtype.itemsize,
        )

    @property
    def layer(self) -> int:
        """The bytes of all weights of a layer, as stored in the checkpoint."""
        return self.attention + self.columns.layer_bytes

    @property
    def total(self) -> int:
        """The bytes of all weights."""
        return self.outside + self.columns.depth * self.layer

    def memory(self, share: float) -> int:
        """Return the bytes of all other weights and of this share of the MLPs' columns."""
        return self.outside + round(self.columns.depth * (self.attention + share * self.columns.layer_bytes))

    def parse_memory(self, memory: str) -> int:
        """Return the bytes of a size such as ``"2GB"``, or of a share of the MLPs' columns such as ``"50%"``.

        Raises:
            ValueError: The string has another form, or the size is too small.
        """
        try:
            if memory.endswith("%"):
                if not 0 <= (share := float(memory[:-1]) / 100) <= 1:
                    raise ValueError
                return self.memory(share)
            size = parse_size(memory)
        except ValueError:
            raise ValueError(
                f"memory={memory!r} must be a size such as '2GB', or a share of the MLPs from '0%' to '100%'"
            ) from None
        self.share(size)
        return size

    def share(self, memory: int) -> float:
        """Return the share of the MLPs' columns, from 0 to 1, that fits into ``memory`` bytes.

        Raises:
            ValueError: Even the weights that are always in memory do not fit.
        """
        if memory < (smallest := self.memory(0)):
            raise ValueError(
                f"memory={memory:,} is too small: embeddings, head and attention of this model take {smallest:,} "
                f"bytes"
            )
        return min(1.0, (memory - smallest) / (self.columns.depth * self.columns.layer_bytes))

    def resident(self, memory: int) -> int:
        """Return how many whole layers fit into ``memory`` bytes."""
        return max(0, min(self.columns.depth, (memory - self.outside) // self.layer))


@dataclass(frozen=True)
class Need:
    """This class counts the columns of one kind that one layer needs, token by token.

    Attributes:
        kind: Kind of the columns.
        hits: Number of columns that are in memory, int64 ``[tokens]``.
        missing: Number of columns to read, int64 ``[tokens]``.
        reads: Bytes of each read, with the gaps that are read through, int64 ``[reads]`` for each token.
    """

    kind: Kind
    hits: NDArray[np.int64]
    missing: NDArray[np.int64]
    reads: list[NDArray[np.int64]]


@dataclass(frozen=True)
class Estimate:
    """This class holds the estimated speed of one way of generating.

    Attributes:
        way: One of ``WAYS``.
        tokens_per_second: Tokens a second.
        bytes_per_token: Bytes that are read from disk for a token.
        hit_rate: Share of the used columns that are in memory; None for whole layers.
    """

    way: str
    tokens_per_second: float
    bytes_per_token: float
    hit_rate: float | None


def simulate(
    activations: Activations,
    shape: Shape,
    machine: Machine,
    *,
    memory: int,
    shares: Sequence[Shares],
    preference: Preference = PREFERENCE,
) -> list[Estimate]:
    """Estimate how fast each way generates, in the order of ``WAYS``.

    Args:
        activations: Activations of the model, or of a smaller one, see :meth:`Activations.layer`.
        shape: Shape of the model.
        machine: The machine that the model runs on.
        memory: Bytes of memory for weights, the same for each way.
        shares: Shares that each layer's MLP keeps.
        preference: Preference of cache-aware DIP for columns in memory.

    Raises:
        ValueError: The memory is too small, or the number of shares is not the number of layers.
    """
    sizes = shape.columns
    if len(shares) != sizes.depth:
        raise ValueError(f"there are {len(shares)} shares for {sizes.depth} layers: give one for each")
    share = shape.share(memory)
    resident = shape.resident(memory)
    read = (sizes.depth - resident) * shape.layer
    found = [Estimate(DENSE, 1 / streaming_seconds(shape, machine, resident), read, None)]
    for way, how in ((DIP, Caching(share)), (CACHE_AWARE, Caching(share, preference))):
        needs = find_needs(activations, sizes, shares, how, gap=machine.gap)
        traffic = count_traffic(needs, sizes)
        seconds = pruned_seconds(shape, machine, needs).mean()
        found.append(Estimate(way, float(1 / seconds), read_bytes(needs), traffic.hit_rate()))
    return found


def find_needs(
    activations: Activations, sizes: ColumnSizes, shares: Sequence[Shares], caching: Caching, *, gap: int
) -> list[list[Need]]:
    """Send activations through each layer's caches, and return the needs by layer and kind.

    ``gap`` is the longest gap between two columns, in bytes, that is read through.
    """
    return [
        [
            _need(magnitudes, own, caching, kind, sizes.row_bytes(kind), gap)
            for kind, magnitudes in zip(KINDS, activations.layer(number, sizes), strict=True)
        ]
        for number, own in enumerate(shares)
    ]


def _need(magnitudes: Magnitudes, shares: Shares, caching: Caching, kind: Kind, row: int, gap: int) -> Need:
    columns = magnitudes.shape[1]
    cache, count = caching.cache(columns, kind, shares), kept(columns, getattr(shares, kind))
    hits, absent, reads = [], [], []
    for token in magnitudes.astype(np.float32):
        choice = cache.choose(token, count)
        hits.append(choice.hits)
        missing = choice.columns[choice.hits :]
        absent.append(len(missing))
        if len(missing):
            lows, highs, joined = find_sectors(missing * row, row, gap)
            edges = np.flatnonzero(~joined)
            reads.append(highs[np.append(edges[1:] - 1, -1)] - lows[edges])
        else:
            reads.append(missing)
    return Need(kind, np.array(hits), np.array(absent), reads)


def read_bytes(needs: Sequence[Sequence[Need]]) -> float:
    """Return the bytes that are read for a token."""
    tokens = len(needs[0][0].hits)
    return sum(float(sizes.sum()) for layer in needs for need in layer for sizes in need.reads) / tokens


def count_traffic(needs: Sequence[Sequence[Need]], sizes: ColumnSizes) -> Traffic:
    """Add up the needs of all layers."""
    hits = np.array([[need.hits.sum() for need in layer] for layer in needs])
    missing = np.array([[need.missing.sum() for need in layer] for layer in needs])
    return Traffic(sizes, len(needs[0][0].hits), hits + missing, hits)


def pruned_seconds(shape: Shape, machine: Machine, needs: Sequence[Sequence[Need]]) -> NDArray[np.float64]:
    """Estimate the seconds of each token with DIP, float64 ``[tokens]``.

    Columns of each kind are chosen. Missing columns are read while columns in memory are multiplied. When all have
    come, they are multiplied, and copied into the cache. Nothing is read ahead, because a choice depends on what
    was computed before it.
    """
    sizes = shape.columns
    seconds = np.full(len(needs[0][0].hits), shape.head / machine.memory_bandwidth)
    for layer in needs:
        seconds += machine.layer + shape.attention / machine.memory_bandwidth
        for need in layer:
            row = sizes.row_bytes(need.kind)
            multiplying = float(machine.column(row))
            keeping = 2 * row / machine.memory_bandwidth  # keeping a column reads and writes it
            reading = [machine.reading(reads) for reads in need.reads]
            seconds += float(machine.choosing(sizes.count(need.kind)))
            seconds += np.maximum(need.hits * multiplying, reading) + need.missing * (multiplying + keeping)
    return seconds


def streaming_seconds(shape: Shape, machine: Machine, resident: int) -> float:
    """Estimate the seconds between two tokens if all layers but ``resident`` are streamed; see :class:`Streamer`.

    Layers are read one after another into two buffers. A buffer is free again when its layer has been computed.
    Streamed layers are spread evenly. Reading goes on from one token to the next.
    """
    depth = shape.columns.depth
    count = depth - resident
    streamed = {number * depth // count for number in range(count)}
    reading = shape.layer / machine.disk_bandwidth
    computing = machine.layer + shape.layer / machine.memory_bandwidth
    clock = arrived = 0.0  # the time now, and the time when the last read ended
    free = [0.0, 0.0]  # the time when each buffer became free
    ends = []
    for _ in range(8):  # four tokens settle the buffers, and four are measured
        for number in range(depth):
            if number in streamed:
                arrived = max(arrived, free.pop(0)) + reading
                clock = max(clock, arrived)
            clock += computing
            if number in streamed:
                free.append(clock)
        clock += shape.head / machine.memory_bandwidth
        ends.append(clock)
    return (ends[-1] - ends[3]) / 4
