"""Columns of matrices as rows of a table, and the kernels of dynamic input pruning in torch and numpy.

A row has its entries in the dtype of the states, or in 8 or 4 bits. Those are in groups of 32 that share a scale,
and with 4 bits a minimum: an entry q stands for ``scale * q``, or for ``scale * q + minimum``. A row of 8 bits has
its entries and then its scales in float16. A row of 4 bits has its entries, then its scales and then its minima in
int8, and two float32 numbers that these are multiplied by: so it takes 4.5 bits for an entry, and not 5. A group
of 4 bits is 16 bytes, whose low halves are its first 16 entries. Rows begin at multiples of 64 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from grating_core.kernels.groups import GROUP, quantized_groups
from grating_core.memory.pieces import Pieces

_LINE = 64  # bytes
_FACTORS = 8  # bytes of what scales and minima of 4 bits are multiplied by
NOWHERE = -1
"""The slot of a column that is not in memory, and the column of an empty slot."""


@dataclass(frozen=True)
class RowFormat:
    """This class says how a column lies as a row of a table.

    Attributes:
        length: Number of entries.
        dtype: Dtype of the entries if they are not quantised: float32 or bfloat16.
        bits: Bits of a quantised entry, 8 or 4; None for entries that are not quantised.
    """

    length: int
    dtype: torch.dtype
    bits: int | None = None

    @property
    def groups(self) -> int:
        """The number of groups of a quantised row."""
        return -(-self.length // GROUP)

    @property
    def row_bytes(self) -> int:
        """The bytes from the begin of a row to that of the next."""
        if self.bits is None:
            size = self.length * self.dtype.itemsize
        else:
            size = self.groups * (GROUP * self.bits // 8 + 2) + (_FACTORS if self.bits == 4 else 0)
        return -(-size // _LINE) * _LINE


class Held(NamedTuple):
    """This class records which columns of a matrix are in memory. :func:`choose` changes its arrays.

    Attributes:
        slots: Slot of each column, int64 ``[columns]``; ``NOWHERE`` for none.
        columns: Column at each slot, int64 ``[capacity]``; ``NOWHERE`` for none.
        uses: How often each column was used, int64 ``[columns]``.
    """

    slots: NDArray[np.int64]
    columns: NDArray[np.int64]
    uses: NDArray[np.int64]


class Choice(NamedTuple):
    """A choice holds the columns that one token uses.

    Attributes:
        columns: Numbers of the columns, int64 ``[k]``: first those in memory, then those to read, both rising.
        slots: Slot of each column, int64 ``[k]``. Numbers from the capacity on are slots beside the cache, where a
            column stays for this token only.
        hits: Number of columns that are in memory already.
    """

    columns: NDArray[np.int64]
    slots: NDArray[np.int64]
    hits: int


def pack_columns(rows: Tensor, form: RowFormat, importance: Tensor | None = None) -> NDArray[np.uint8]:
    """Return rows as a table has them, uint8 ``[n, bytes of a row]``.

    Args:
        rows: The rows ``[n, length]``, of any floating dtype.
        form: Their format in the table.
        importance: How much squared errors of the entries count, float32 ``[length]``; None for the same of all.
            Only formats of 4 bits look at it.
    """
    table = torch.zeros(len(rows), form.row_bytes, dtype=torch.uint8)
    if form.bits is None:
        parts = [rows.to(form.dtype)]
    elif form.bits == 8:
        entries, scale, _ = quantized_groups(rows, 8)
        parts = [pad(entries, (0, form.groups * GROUP - form.length)), scale]
    else:
        parts = _packed_4_bits(rows, form, importance)
    at = 0
    for part in parts:
        data = part.contiguous().view(torch.uint8)
        table[:, at : at + data.shape[1]] = data
        at += data.shape[1]
    found: NDArray[np.uint8] = table.numpy()
    return found


def _packed_4_bits(rows: Tensor, form: RowFormat, importance: Tensor | None) -> list[Tensor]:
    """Return entries, scales, minima and factors of rows; the entries are the nearest with the rounded scales."""
    _, scale, minimum = quantized_groups(rows, 4, importance, minima=True)
    assert minimum is not None
    lines = torch.stack((scale.float(), minimum.float()))
    factors = lines.abs().amax(-1, keepdim=True) / 127
    steps = torch.where(factors > 0, lines / factors, 0).round_().to(torch.int8)
    scales, minima = (steps * factors)[..., None].unbind()
    wide = pad(rows.float(), (0, form.groups * GROUP - form.length)).view(len(rows), form.groups, GROUP)
    entries = torch.where(scales == 0, 0, (wide - minima) / scales).round_().clamp_(0, 15).to(torch.uint8)
    low, high = entries.view(len(rows), form.groups, 2, GROUP // 2).unbind(2)
    return [(low | high << 4).flatten(1), steps[0], steps[1], factors[..., 0].T]


def add_columns(
    form: RowFormat, table: Tensor, places: NDArray[np.int64], values: NDArray[np.float32], output: Tensor
) -> None:
    """Add the sum of some rows, each times a value, in float32.

    Args:
        form: Format of the rows.
        table: The table, uint8 ``[bytes]``.
        places: Offset of each row in the table, in bytes, int64 ``[k]``.
        values: Value of each row, ``[k]``.
        output: What the sum is added to, float32 ``[length]``.
    """
    output += torch.from_numpy(values) @ _rows(form, table, places)


def unpack_columns(form: RowFormat, table: Tensor, places: NDArray[np.int64], output: Tensor) -> None:
    """Write some rows as states.

    Args:
        form: Format of the rows.
        table: The table, uint8 ``[bytes]``.
        places: Offset of each row in the table, in bytes, int64 ``[k]``.
        output: The states, of bfloat16 or float32 ``[k, length]``.
    """
    output.copy_(_rows(form, table, places))


def _rows(form: RowFormat, table: Tensor, places: NDArray[np.int64]) -> Tensor:
    """Return rows as float32 ``[k, length]``."""
    if not len(places):
        return torch.zeros(0, form.length)  # torch views no bytes of no rows as numbers
    data = table.numpy()[places[:, None] + np.arange(form.row_bytes)]
    rows = torch.from_numpy(data)
    if form.bits is None:
        return rows[:, : form.length * form.dtype.itemsize].contiguous().view(form.dtype).float()
    size = form.groups * GROUP * form.bits // 8
    entries = rows[:, :size].contiguous()
    more = rows[:, size:]
    if form.bits == 8:
        numbers = entries.view(torch.int8).view(-1, form.groups, GROUP).float()
        scale = more[:, : 2 * form.groups].contiguous().view(torch.float16).float()
        return (numbers * scale[..., None]).flatten(1)[:, : form.length]
    halves = entries.view(-1, form.groups, GROUP // 2)
    numbers = torch.cat((halves & 15, halves >> 4), 2).float()
    steps = more[:, : 2 * form.groups].contiguous().view(torch.int8).view(-1, 2, form.groups)
    factors = more[:, 2 * form.groups : 2 * form.groups + _FACTORS].contiguous().view(torch.float32)
    scale, minimum = (steps * factors[..., None]).unbind(1)
    return (numbers * scale[..., None] + minimum[..., None]).flatten(1)[:, : form.length]


def choose(held: Held, values: NDArray[np.float32], count: int, preference: float) -> Choice:
    """Choose columns for one token. Missing columns replace those that are used least frequently.

    Of equal numbers the first ones are taken.

    Args:
        held: The columns in memory. The columns that the choice gives slots to are recorded as in memory.
        values: Value of each column, ``[columns]``. Those with the largest magnitudes are chosen.
        count: Number of columns to choose.
        preference: Factor of the magnitudes of columns that are not in memory.
    """
    magnitudes = np.abs(values)
    absent = held.slots == NOWHERE
    chosen = _largest(np.where(absent, magnitudes * np.float32(preference), magnitudes), count)
    held.uses[chosen] += 1
    there = ~absent[chosen]
    hits, missing = chosen[there], chosen[~there]
    capacity = len(held.columns)
    admitted = _largest(held.uses[missing], min(len(missing), capacity - len(hits)))
    idle = np.where(held.columns == NOWHERE, np.iinfo(np.int64).max, -1 - held.uses[held.columns])
    idle[held.slots[hits]] = np.iinfo(np.int64).min
    slots = _largest(idle, len(admitted))
    evicted = held.columns[slots]
    held.slots[evicted[evicted != NOWHERE]] = NOWHERE
    held.columns[slots] = missing[admitted]
    held.slots[missing[admitted]] = slots
    places = np.full(len(missing), NOWHERE, dtype=np.int64)
    places[admitted] = slots
    beside = places == NOWHERE
    places[beside] = capacity + np.arange(beside.sum())
    return Choice(np.concatenate((hits, missing)), np.concatenate((held.slots[hits], places)), len(hits))


def _largest(keys: NDArray[np.generic], count: int) -> NDArray[np.int64]:
    """Return the places of the largest keys, rising."""
    if count >= len(keys):
        return np.arange(len(keys))
    if count == 0:
        return np.empty(0, dtype=np.int64)
    least = np.partition(keys, -count)[-count]
    more = keys > least
    more[np.flatnonzero(keys == least)[: count - more.sum()]] = True
    return np.flatnonzero(more)


def copy_rows(
    size: int, source: Tensor, sources: NDArray[np.int64], target: Tensor, targets: NDArray[np.int64]
) -> None:
    """Copy rows of ``size`` bytes from places in one table, uint8 ``[bytes]``, to places in another."""
    old, new = source.numpy(), target.numpy()
    for start, end in zip(sources.tolist(), targets.tolist(), strict=True):
        new[end : end + size] = old[start : start + size]


def read_pieces(file: int, pieces: Pieces) -> int:
    """Read pieces of the file that a descriptor stands for, without Python between two pieces.

    Returns:
        How many pieces were read as a whole, from the first on. This one reads none: Python must read them all.
    """
    return 0
