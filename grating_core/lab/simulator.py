"""This module simulates the speed of a model larger than memory: activations and caches are real, time is not.

It compares three ways within the same memory budget, which is spent as the engine spends it. Dense streaming
streams whole layers. DIP keeps the columns in memory that are used most. Cache-aware DIP prefers them. As in the
engine, a plan says what stays in memory, and a :class:`ColumnCache` which columns are chosen, found and read; only
seconds are estimated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from grating_core.columns.cache import Caching, ColumnCache, Preference
from grating_core.columns.companion import KINDS, ColumnSizes
from grating_core.columns.fetching import AHEAD, SLOTS
from grating_core.columns.install import fetching_bytes
from grating_core.columns.masks import Shares, kept
from grating_core.columns.mlp import LIKELY
from grating_core.columns.order import hottest_first
from grating_core.columns.preference import USUAL
from grating_core.columns.reading import Block, plan_blocks
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
        reads: Number of reads when the token has come to the layer, int64 ``[tokens]``.
        bytes: Bytes of these reads, int64 ``[tokens]``.
        blocks: Number of blocks in which they come, int64 ``[tokens]``.
        reads_ahead: Number of reads before, while the layer before is computed, int64 ``[tokens]``.
        bytes_ahead: Bytes of these reads, int64 ``[tokens]``.
    """

    hits: NDArray[np.int64]
    missing: NDArray[np.int64]
    reads: NDArray[np.int64]
    bytes: NDArray[np.int64]
    blocks: NDArray[np.int64]
    reads_ahead: NDArray[np.int64]
    bytes_ahead: NDArray[np.int64]


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
        needs = find_needs(activations, sizes, shares, how, costs=costs)
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
    orders: Sequence[Sequence[NDArray[np.int64]]] | None = None,
) -> list[list[Need]]:
    """Send activations through each layer's caches, and return the needs by layer and kind.

    Args:
        activations: The activations.
        sizes: Sizes of the MLPs.
        shares: Shares that each layer's MLP keeps.
        caching: Size and preference of the caches.
        costs: Costs of a machine, which say what is read together.
        orders: The column at each place of the tables of inputs and of products, of each layer; None: the
            activations tell it.
    """
    start, size = 0, fetching_bytes(sizes) // SLOTS
    found: list[list[Need]] = []
    before: tuple[Magnitudes, int] | None = None
    for number, own in enumerate(shares, 1):
        layer = activations.layer(number - 1, sizes)
        order = tuple(map(find_order, layer)) if orders is None else orders[number - 1]
        needs = []
        for index, kind in enumerate(KINDS):
            row, count = sizes.row_bytes(kind), sizes.count(kind)
            cache = caching.cache(count, kind, own, costs.disk.gap(kind) / row)
            table = _Table(cache, kept(count, getattr(own, kind)), start, row, costs, size)
            start += count * row  # a companion file has tables one behind the other, the first at a whole sector
            likely = None
            if kind == "inputs" and before is not None:
                likely = before[0][:, order[0]], int(LIKELY * before[1])
            needs.append(table.need(layer[index][:, order[index]], likely))
        before = layer[0], kept(sizes.width, own.inputs)
        found.append(needs)
    return found


def find_order(magnitudes: Magnitudes) -> NDArray[np.int64]:
    """Return the columns by the mean square of their magnitudes ``[tokens, columns]``, the largest first."""
    return hottest_first(np.square(magnitudes.astype(np.float32)).mean(0))


@dataclass(frozen=True)
class _Table:
    """This class finds what tokens need of a table of columns, as :class:`ColumnTable` does.

    Attributes:
        cache: What chooses columns.
        count: Number of columns to choose.
        start: Offset of the table in the companion file.
        row: Bytes of a column.
        costs: Costs of a machine.
        size: Bytes of a block.
    """

    cache: ColumnCache
    count: int
    start: int
    row: int
    costs: Costs
    size: int

    def need(self, magnitudes: Magnitudes, likely: tuple[Magnitudes, int] | None) -> Need:
        """Return what tokens need.

        Args:
            magnitudes: Magnitudes by place in the table, ``[tokens, columns]``.
            likely: Those by which columns are read ahead, and how many are likely; None for none ahead.
        """
        found = []
        for index, token in enumerate(magnitudes.astype(np.float32)):
            places, hits = self.cache.choose(token, self.count)
            missing = np.zeros(len(token), dtype=bool)
            missing[places[hits:]] = True
            ahead: list[Block] = []
            if likely is not None:
                guessed, begin = self.cache.choose(likely[0][index].astype(np.float32), likely[1])
                guessed = guessed[begin:]
                ahead = list(islice(self._blocks(guessed, self.costs.disk.reach), AHEAD))
                for block in ahead:
                    missing[guessed[block.columns]] = False
            own = list(self._blocks(np.flatnonzero(missing), self.size))
            found.append((hits, len(places) - hits, *_sizes(own), len(own), *_sizes(ahead)))
        return Need(*np.array(found, dtype=np.int64).T)

    def _blocks(self, places: NDArray[np.int64], size: int) -> Iterator[Block]:
        begins = self.start + places * self.row
        return plan_blocks(begins, self.row, min(size, self.size), self.costs.sector)


def _sizes(blocks: Sequence[Block]) -> tuple[int, int]:
    """Return the number of reads of blocks, and their bytes."""
    sizes = [block.reads.sizes for block in blocks]
    return sum(map(len, sizes)), sum(int(part.sum()) for part in sizes)


def read_bytes(needs: Sequence[Sequence[Need]]) -> NDArray[np.int64]:
    """Return the bytes of columns that are read for each token, int64 ``[tokens]``."""
    found: NDArray[np.int64] = np.sum([need.bytes + need.bytes_ahead for layer in needs for need in layer], axis=0)
    return found


def pruned_seconds(plan: MemoryPlan, costs: Costs, needs: Sequence[Sequence[Need]]) -> NDArray[np.float64]:
    """Estimate the seconds of each token with DIP, float64 ``[tokens]``.

    Columns of each kind are chosen, and read one behind the other. Those in memory are multiplied meanwhile, and
    those that come, all but the last ones. Between the reads of a layer's kinds, and behind them, some columns of
    the next layer are read ahead; see :class:`Fetcher`.
    """
    streamed, tokens = set(plan.streamed), len(needs[0][0].hits)
    clock, disk = np.zeros((2, tokens))  # now, and when the disk has read what was asked for
    for number, layer in enumerate(needs, 1):
        clock = clock + (costs.pruned_streamed if number in streamed else costs.pruned)
        following = needs[number][0] if number < len(needs) else None
        for need, cost in zip(layer, costs.columns, strict=True):
            disk = np.maximum(disk, clock) + _reading(costs, need.reads, need.bytes)
            arriving = need.missing * cost.arriving
            last = arriving / np.maximum(1, need.blocks)
            clock = clock + need.hits * cost.held + arriving - last
            waiting = np.where(need.bytes + need.bytes_ahead > 0, disk, 0)
            clock = np.maximum(clock, waiting) + last + (need.missing > 0) * cost.starting
            if following is not None:
                disk = disk + _reading(costs, following.reads_ahead, following.bytes_ahead) / len(layer)
    return clock + costs.outside_pruned


def _reading(costs: Costs, reads: NDArray[np.int64], size: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the seconds that reads take, float64 ``[tokens]``."""
    seconds: NDArray[np.float64] = (reads > 0) * costs.latency + costs.each * reads + costs.byte * size
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
