"""How fast a model larger than memory generates on some machine: real activations, real caches, simulated time.

Three ways are compared, with the same bytes in memory: dense, with whole layers streamed; DIP, whose caches of
columns give way to the most frequently used; and cache-aware DIP, which prefers columns that are in memory. Which
columns are chosen, found and read comes from :class:`ColumnCache`, as in the engine; only seconds are estimated.
Not in the memory that is given: buffers for what is being read, and the keys and values of the context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import convert_file_size_to_int
from numpy.typing import NDArray

from grating_core.columns.cache import Caching, Preference
from grating_core.columns.companion import KINDS, ColumnSizes, Kind
from grating_core.columns.install import PREFERENCE
from grating_core.columns.masks import Shares, kept
from grating_core.lab.activations import ActivationTrace, empty_decoder
from grating_core.lab.machine import Machine
from grating_core.lab.traffic import Traffic

DENSE, DIP, CACHE_AWARE = WAYS = ("dense streaming", "DIP", "cache-aware DIP")


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, in bytes where nothing else is said.

    Attributes:
        columns: Of its MLPs.
        attention: Weights of a layer beside the MLP.
        outside: Weights outside the layers, always in memory.
        head: Those of them that every token is multiplied by.
    """

    columns: ColumnSizes
    attention: int
    outside: int
    head: int

    @classmethod
    def of(cls, directory: Path, dtype: torch.dtype) -> Shape:
        """The shape of a model, from its ``config.json`` alone.

        Args:
            directory: Holds the file.
            dtype: Of the weights.

        Raises:
            ModelNotFoundError: The file is missing or senseless.
            UnsupportedModelError: It is no decoder with gated MLPs.
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
        """All weights of a layer, as they are in the checkpoint."""
        return self.attention + self.columns.layer_bytes

    @property
    def total(self) -> int:
        """All weights."""
        return self.outside + self.columns.depth * self.layer

    def memory(self, share: float) -> int:
        """What it takes to hold this share of the MLPs' columns, and all else."""
        return self.outside + round(self.columns.depth * (self.attention + share * self.columns.layer_bytes))

    def parse_memory(self, memory: str) -> int:
        """Bytes, from a size such as ``"2GB"`` or from a share of the MLPs' columns such as ``"50%"``.

        Raises:
            ValueError: It is neither, or too small.
        """
        try:
            if memory.endswith("%"):
                if not 0 <= (share := float(memory[:-1]) / 100) <= 1:
                    raise ValueError
                return self.memory(share)
            size = int(convert_file_size_to_int(memory.strip().upper()))
        except ValueError:
            raise ValueError(
                f"memory={memory!r} must be a size such as '2GB', or a share of the MLPs from '0%' to '100%'"
            ) from None
        self.share(size)
        return size

    def share(self, memory: int) -> float:
        """The share of the MLPs' columns that so much memory holds, from 0 to 1.

        Raises:
            ValueError: Not even what is always in memory fits.
        """
        if memory < (smallest := self.memory(0)):
            raise ValueError(
                f"memory={memory:,} is too small: embeddings, head and attention of this model take {smallest:,} "
                f"bytes"
            )
        return min(1.0, (memory - smallest) / (self.columns.depth * self.columns.layer_bytes))

    def resident(self, memory: int) -> int:
        """How many whole layers so much memory holds."""
        return max(0, min(self.columns.depth, (memory - self.outside) // self.layer))


@dataclass(frozen=True)
class Need:
    """What one layer needs of one kind of columns, token by token.

    Attributes:
        kind: Of the columns.
        hits: Columns that are in memory, int64 ``[tokens]``.
        runs: For each token the lengths of the runs of neighbouring columns that have to be read.
    """

    kind: Kind
    hits: NDArray[np.int64]
    runs: list[NDArray[np.int64]]

    @property
    def missing(self) -> NDArray[np.int64]:
        """Columns that have to be read, int64 ``[tokens]``."""
        return np.array([lengths.sum() for lengths in self.runs])


@dataclass(frozen=True)
class Estimate:
    """How one way does.

    Attributes:
        way: One of ``WAYS``.
        tokens_per_second: How fast it generates.
        bytes_per_token: What it reads from disk for a token.
        hit_rate: Share of the columns wanted that are in memory; None for whole layers.
    """

    way: str
    tokens_per_second: float
    bytes_per_token: float
    hit_rate: float | None


def simulate(
    trace: ActivationTrace,
    shape: Shape,
    machine: Machine,
    *,
    memory: int,
    shares: Sequence[Shares],
    preference: Preference = PREFERENCE,
) -> list[Estimate]:
    """How the ways of generating compare, in the order of ``WAYS``.

    Args:
        trace: Of the model, or of a smaller one; see :meth:`ActivationTrace.layer` for what that assumes.
        shape: Of the model.
        machine: Where it runs.
        memory: Bytes for weights, the same for each way.
        shares: What each layer's MLP keeps.
        preference: Of cache-aware DIP.

    Raises:
        ValueError: The memory is too small, or the shares are not one for each layer.
    """
    sizes = shape.columns
    if len(shares) != sizes.depth:
        raise ValueError(f"there are {len(shares)} shares for {sizes.depth} layers: give one for each")
    share = shape.share(memory)
    resident = shape.resident(memory)
    read = (sizes.depth - resident) * shape.layer
    found = [Estimate(DENSE, 1 / streaming_seconds(shape, machine, resident), read, None)]
    for way, how in ((DIP, Caching(share)), (CACHE_AWARE, Caching(share, preference))):
        needs = replay(trace, sizes, shares, how)
        traffic = count_traffic(needs, sizes)
        seconds = pruned_seconds(shape, machine, needs).mean()
        found.append(Estimate(way, float(1 / seconds), traffic.bytes_per_token, traffic.hit_rate()))
    return found


def replay(
    trace: ActivationTrace, sizes: ColumnSizes, shares: Sequence[Shares], caching: Caching
) -> list[list[Need]]:
    """What each layer needs, kind by kind, when a trace goes through its caches."""
    needs = []
    for number, kept_here in enumerate(shares):
        magnitudes = dict(zip(KINDS, trace.layer(number, sizes), strict=True))
        needs.append([_replay_kind(magnitudes[kind], kept_here, caching, kind) for kind in KINDS])
    return needs


def _replay_kind(magnitudes: NDArray[np.float16], shares: Shares, caching: Caching, kind: Kind) -> Need:
    columns = magnitudes.shape[1]
    cache, count = caching.cache(columns, kind, shares), kept(columns, getattr(shares, kind))
    hits, runs = [], []
    for token in magnitudes.astype(np.float32):
        choice = cache.choose(token, count)
        hits.append(choice.hits)
        runs.append(_run_lengths(np.sort(choice.columns[choice.hits :])))
    return Need(kind, np.array(hits), runs)


def _run_lengths(columns: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many neighbours there are in each run of some numbers, which rise."""
    if not len(columns):
        return columns
    edges = np.flatnonzero(np.diff(columns) != 1) + 1
    return np.diff(np.concatenate(([0], edges, [len(columns)])))


def count_traffic(needs: Sequence[Sequence[Need]], sizes: ColumnSizes) -> Traffic:
    """The sums of what was needed."""
    hits = np.array([[need.hits.sum() for need in layer] for layer in needs])
    missing = np.array([[need.missing.sum() for need in layer] for layer in needs])
    return Traffic(sizes, len(needs[0][0].hits), hits + missing, hits)


def pruned_seconds(shape: Shape, machine: Machine, needs: Sequence[Sequence[Need]]) -> NDArray[np.float64]:
    """Seconds of each token: this is the model of time of DIP.

    Of each kind, columns are chosen; those that are missing are read while those in memory are multiplied, and
    multiplied and copied to where they are kept when all have come. Nothing is read ahead, since a choice depends
    on what was computed before it.
    """
    sizes = shape.columns
    seconds = np.full(len(needs[0][0].hits), shape.head / machine.memory_bandwidth)
    for layer in needs:
        seconds += machine.layer + shape.attention / machine.memory_bandwidth
        for need in layer:
            used = sizes.used(need.kind) * sizes.dtype.itemsize
            multiplying = float(machine.column(used))
            keeping = 2 * used / machine.memory_bandwidth  # read and written
            reading = [machine.reading(lengths * sizes.row_bytes(need.kind)) for lengths in need.runs]
            seconds += float(machine.choosing(sizes.count(need.kind)))
            seconds += np.maximum(need.hits * multiplying, reading) + need.missing * (multiplying + keeping)
    return seconds


def streaming_seconds(shape: Shape, machine: Machine, resident: int) -> float:
    """Seconds of a token when all layers but some are streamed: this is the model of time of :class:`Streamer`.

    One layer after the other is read into two buffers, of which one is free again when its layer has been
    computed. Those streamed are spread evenly. Reading goes on from one token to the next, so the time is that
    between two tokens.
    """
    depth = shape.columns.depth
    count = depth - resident
    streamed = {number * depth // count for number in range(count)}
    reading = shape.layer / machine.disk_bandwidth
    computing = machine.layer + shape.layer / machine.memory_bandwidth
    clock = arrived = 0.0  # now, and when the last read ended
    free = [0.0, 0.0]  # since when each buffer has been free
    ends = []
    for _ in range(8):  # four to settle, four to measure
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
