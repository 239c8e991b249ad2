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

_LINE = 64  # bytes
_FACTORS = 8  # bytes of what scales and minima of 4 bits are multiplied by


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


class Choice(NamedTuple):
    """A choice holds the columns that one token uses.

    Attributes:
        places: Places of the columns in the table, rising, int64 ``[k]``.
        hits: Number of them that are in memory: the first ones.
    """

    places: NDArray[np.int64]
    hits: int


def pack_columns(rows: Tensor, form: RowFormat, importance: Tensor | None = None) -> NDArray[np.uint8]:
    """Return rows as a table has them, uint8 ``[n, bytes of a row]``.

    Args:
        rows: The rows ``[n, length]``, of any floating dtype.
        form: Their format in the table.
        importance: How much squared errors of the entries count, float32 ``[length]``; None for the same of all.
            Only 4 bits are chosen by it.
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


def choose(values: NDArray[np.float32], resident: int, count: int, preference: float, cost: float) -> Choice:
    """Choose columns for one token.

    Columns are chosen if their magnitudes are among the ``count`` largest. If reads cost anything, all columns in
    memory are used, because they are there. The others lie on disk one behind the other, and what is read is used.
    So they are used in runs: a column is worth the square of its magnitude, as a share of the least one that would
    be chosen, less 1; a run costs a read; and the runs are those with the largest sum. Without such a cost, the
    largest columns are used. Columns that are 0 are not.

    Args:
        values: Value of each column in the order of the table, ``[columns]``.
        resident: Number of columns that are in memory: the first ones.
        count: Number of columns that would be used if all were in memory.
        preference: Factor of the magnitudes of columns that are not in memory.
        cost: What a read costs, in columns.
    """
    magnitudes = np.abs(values)
    magnitudes[resident:] *= np.float32(preference)
    least = np.partition(magnitudes, -count)[-count] if count < len(magnitudes) else magnitudes.min()
    least = max(least, np.finfo(np.float32).smallest_subnormal)
    reads = cost > 0 and resident < len(values)
    there = np.arange(resident) if reads else np.flatnonzero(magnitudes[:resident] >= least)
    runs = _find_runs(np.square(magnitudes[resident:].astype(np.float64) / float(least)) - 1, cost)
    return Choice(np.concatenate((there, resident + np.flatnonzero(runs))), len(there))


def _find_runs(worth: NDArray[np.float64], cost: float) -> NDArray[np.bool_]:
    """Tell which columns are in the runs with the largest sum, less a cost for each run."""
    # What the best runs so far are worth if the last of them goes on, and if it has ended.
    going, ended = -np.inf, 0.0
    steps = []
    for gain in worth.tolist():
        goes_on = going >= ended - cost
        going = (going if goes_on else ended - cost) + gain
        ends = going >= ended
        ended = going if ends else ended
        steps.append((goes_on, ends))
    used, is_used = np.zeros(len(worth), dtype=bool), False
    for place in reversed(range(len(worth))):
        goes_on, ends = steps[place]
        used[place] = is_used or ends
        is_used = bool(used[place]) and goes_on
    return used
