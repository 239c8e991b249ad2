"""This module simulates the speed of a model larger than memory: activations and caches are real, time is not.

It compares three ways within the same memory budget, which is spent as the engine spends it. Dense streaming
streams whole layers. DIP keeps the columns in memory that are used most. Cache-aware DIP prefers them. As in the
engine, a plan says what stays in memory, and a :class:`ColumnCache` which columns are chosen, found and read; only
seconds are estimated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from grating_core.columns.cache import Caching, Preference
from grating_core.columns.companion import KINDS, ColumnSizes, Kind, tables
from grating_core.columns.masks import Shares, kept
from grating_core.columns.order import hottest_first
from grating_core.columns.preference import USUAL
from grating_core.columns.reading import plan_blocks
from grating_core.lab.activations import Activations, Magnitudes
from grating_core.lab.machine import Costs
from grating_core.lab.shape import Shape
from grating_core.memory.plan import MemoryPlan

DENSE, DIP, CACHE_AWARE = WAYS = ("dense streaming", "DIP", "cache-aware DIP")


@dataclass(frozen=True)
class Need:
    """This class counts the columns of one kind that one layer needs, token by token.

    Attributes:
        hits: Number of columns that are in memory, int64 ``[tokens]``.
        missing: Number of columns to read, int64 ``[tokens]``.
        reads: Number of reads, int64 ``[tokens]``.
        bytes: Bytes of all reads, int64 ``[tokens]``.
    """

    hits: NDArray[np.int64]
    missing: NDArray[np.int64]
    reads: NDArray[np.int64]
    bytes: NDArray[np.int64]


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
    costs: Costs,
    *,
    budget: int,
    shares: Sequence[Shares],
    preference: Preference = USUAL,
) -> list[Estimate]:
    """Estimate how fast each way generates, in the order of ``WAYS``.

    Args:
        activations: Activations of the model, or of a smaller one, see :meth:`Activations.layer`.
        shape: Shape of the model.
        costs: Costs of the model on a machine.
        budget: The memory budget in bytes, the same for each way.
        shares: Shares that each layer's MLP keeps.
        preference: Preference of cache-aware DIP for columns in memory.

    Raises:
        BudgetError: The budget is too small.
        ValueError: The number of shares is not the number of layers.
    """
    sizes = shape.columns
    if len(shares) != sizes.depth:
        raise ValueError(f"there are {len(shares)} shares for {sizes.depth} layers: give one for each")
    plan, dense = shape.pruned.plan(budget), simulate_dense(shape, costs, budget)
    found = [dense]
    for way, how in ((DIP, Caching(plan.column_share)), (CACHE_AWARE, Caching(plan.column_share, preference))):
        needs = find_needs(activations, sizes, shares, how, costs=costs, staging=plan.sizes.staging)
        seconds = pruned_seconds(plan, costs, needs)
        hits, missing = (sum(int(part.sum()) for part in parts) for parts in _parts(needs))
        read = plan.bytes_read() + float(read_bytes(needs).mean())
        found.append(Estimate(way, 1 / float(seconds.mean()), read, hits / (hits + missing)))
    return found


def simulate_dense(shape: Shape, costs: Costs, budget: int) -> Estimate:
    """Estimate how fast the model generates with dense MLPs.

    Raises:
        BudgetError: The budget is too small.
    """
    plan = shape.dense.plan(budget)
    return Estimate(DENSE, 1 / streaming_seconds(plan, costs), plan.bytes_read(), None)


def _parts(needs: Sequence[Sequence[Need]]) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    flat = [need for layer in needs for need in layer]
    return [need.hits for need in flat], [need.missing for need in flat]


def find_needs(
    activations: Activations,
    sizes: ColumnSizes,
    shares: Sequence[Shares],
    caching: Caching,
    *,
    costs: Costs,
    staging: int,
    in_order: bool = False,
) -> list[list[Need]]:
    """Send activations through each layer's caches, and return the needs by layer and kind.

    Args:
        activations: The activations.
        sizes: Sizes of the MLPs.
        shares: Shares that each layer's MLP keeps.
        caching: Size and preference of the caches.
        costs: Costs of a machine, which say what is read together.
        staging: Bytes of the memory that columns are read into.
        in_order: Whether columns have the order of the tables; otherwise the activations tell it.
    """
    memory, start, starts = np.empty(staging, dtype=np.uint8), 0, {}
    for table in tables(sizes):  # a companion file has them one behind the other, the first at a whole sector
        starts[table] = start
        start += sizes.count(table[1]) * sizes.row_bytes(table[1])
    return [
        [
            _need(
                magnitudes if in_order else magnitudes[:, find_order(magnitudes)],
                own,
                caching,
                kind,
                starts[number, kind],
                sizes.row_bytes(kind),
                costs,
                memory,
            )
            for kind, magnitudes in zip(KINDS, activations.layer(number - 1, sizes), strict=True)
        ]
        for number, own in enumerate(shares, 1)
    ]


def find_order(magnitudes: Magnitudes) -> NDArray[np.int64]:
    """Return the columns by the mean square of their magnitudes ``[tokens, columns]``, the largest first."""
    return hottest_first(np.square(magnitudes.astype(np.float32)).mean(0))


def _need(
    magnitudes: Magnitudes,
    shares: Shares,
    caching: Caching,
    kind: Kind,
    start: int,
    row: int,
    costs: Costs,
    memory: NDArray[np.uint8],
) -> Need:
    columns = magnitudes.shape[1]
    cache = caching.cache(columns, kind, shares, costs.gap / row)
    count = kept(columns, getattr(shares, kind))
    found = []
    for token in magnitudes.astype(np.float32):
        places, hits = cache.choose(token, count)
        blocks = plan_blocks(start + places[hits:] * row, row, memory, costs.sector)
        reads = [block.reads.sizes for block in blocks]
        found.append((hits, len(places) - hits, sum(map(len, reads)), sum(int(sizes.sum()) for sizes in reads)))
    return Need(*np.array(found, dtype=np.int64).T)


def read_bytes(needs: Sequence[Sequence[Need]]) -> NDArray[np.int64]:
    """Return the bytes of columns that are read for each token, int64 ``[tokens]``."""
    found: NDArray[np.int64] = np.sum([need.bytes for layer in needs for need in layer], axis=0)
    return found


def pruned_seconds(plan: MemoryPlan, costs: Costs, needs: Sequence[Sequence[Need]]) -> NDArray[np.float64]:
    """Estimate the seconds of each token with DIP, float64 ``[tokens]``.

    Columns of each kind are chosen. Missing columns are read while columns in memory are multiplied. When all have
    come, they are multiplied. Nothing is read ahead, because a choice depends on what
    was computed before it.
    """
    streamed = len(plan.streamed)
    layers = (len(needs) - streamed) * costs.pruned + streamed * costs.pruned_streamed
    seconds = np.full(len(needs[0][0].hits), costs.outside_pruned + layers)
    for layer in needs:
        for need, cost in zip(layer, costs.columns, strict=True):
            missing = need.missing > 0
            reading = missing * costs.latency + costs.each * need.reads + costs.byte * need.bytes
            seconds += np.maximum(need.hits * cost.held, reading)
            seconds += need.missing * cost.arriving + missing * cost.starting
    return seconds


def streaming_seconds(plan: MemoryPlan, costs: Costs) -> float:
    """Estimate the seconds between two tokens of a dense model; see :class:`Streamer`.

    Layers are read one after another into two buffers. A buffer is free again when its layer has been computed,
    and reading goes on from one token to the next.
    """
    streamed = set(plan.streamed)
    clock = arrived = 0.0  # the time now, and the time when the last read ended
    free = [0.0] * min(2, len(streamed))  # the time when each buffer became free
    ends = []
    for _ in range(8):  # four tokens settle the buffers, and four are measured
        for number, size in enumerate(plan.sizes.bytes_read, 1):
            if number not in streamed:
                clock += costs.layer
                continue
            arrived = max(arrived, free.pop(0)) + size / costs.bandwidth
            clock = max(clock, arrived) + costs.streamed
            free.append(clock)
        clock += costs.outside
        ends.append(clock)
    return (ends[-1] - ends[3]) / 4
