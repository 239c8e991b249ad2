"""The compiled kernels of dynamic input pruning. :mod:`grating_core.kernels.columns` says what each does."""

from __future__ import annotations

from ctypes import Structure, byref, c_float, c_int32, c_int64, c_void_p
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from grating_core.kernels.columns import Choice, Held, RowFormat
from grating_core.kernels.loading import DTYPES, started
from grating_core.memory.pieces import Pieces

_GROUPED = {8: 3, 4: 4}


class _Columns(Structure):
    """This class mirrors ``gk_columns``."""

    _fields_ = [
        ("format", c_int32),
        ("length", c_int64),
        ("count", c_int64),
        ("table", c_void_p),
        ("places", c_void_p),
        ("values", c_void_p),
        ("output", c_void_p),
    ]


class _Cache(Structure):
    """This class mirrors ``gk_cache``."""

    _fields_ = [
        ("columns", c_int64),
        ("capacity", c_int64),
        ("slots", c_void_p),
        ("held", c_void_p),
        ("uses", c_void_p),
        ("preference", c_float),
    ]


class _Choice(Structure):
    """This class mirrors ``gk_choice``."""

    _fields_ = [("columns", c_void_p), ("slots", c_void_p), ("hits", c_int64)]


def add_columns(
    form: RowFormat, table: Tensor, places: NDArray[np.int64], values: NDArray[np.float32], output: Tensor
) -> None:
    """See :func:`grating_core.kernels.columns.add_columns`."""
    started().gk_run_columns(byref(_columns(form, table, places, _at(values), output.data_ptr())))


def unpack_columns(form: RowFormat, table: Tensor, places: NDArray[np.int64], output: Tensor) -> None:
    """See :func:`grating_core.kernels.columns.unpack_columns`. The output is contiguous."""
    call = _columns(form, table, places, None, None)
    started().gk_unpack_columns(byref(call), c_int32(DTYPES[output.dtype]), c_void_p(output.data_ptr()))


def _columns(
    form: RowFormat, table: Tensor, places: NDArray[np.int64], values: int | None, output: int | None
) -> _Columns:
    number = DTYPES[form.dtype] if form.bits is None else _GROUPED[form.bits]
    return _Columns(number, form.length, len(places), table.data_ptr(), _at(places), values, output)


def choose(held: Held, values: NDArray[np.float32], count: int, preference: float) -> Choice:
    """See :func:`grating_core.kernels.columns.choose`."""
    count = min(count, len(held.slots))
    values = np.ascontiguousarray(values, dtype=np.float32)
    columns, slots = np.empty((2, count), dtype=np.int64)
    cache = _Cache(len(held.slots), len(held.columns), *map(_at, held), preference)
    choice = _Choice(_at(columns), _at(slots), 0)
    if started().gk_choose(byref(cache), c_void_p(_at(values)), c_int64(count), byref(choice)):
        raise MemoryError("The kernels got no memory for choosing columns.")
    return Choice(columns, slots, choice.hits)


def copy_rows(
    size: int, source: Tensor, sources: NDArray[np.int64], target: Tensor, targets: NDArray[np.int64]
) -> None:
    """See :func:`grating_core.kernels.columns.copy_rows`."""
    started().gk_copy(
        c_int64(len(sources)),
        c_int64(size),
        c_void_p(source.data_ptr()),
        c_void_p(_at(sources)),
        c_void_p(target.data_ptr()),
        c_void_p(_at(targets)),
    )


def read_pieces(file: int, pieces: Pieces) -> int:
    """See :func:`grating_core.kernels.columns.read_pieces`. Other threads of Python go on meanwhile."""
    read: Any = started().gk_read
    read.restype = c_int64
    starts, sizes, places = (c_void_p(_at(part)) for part in (pieces.starts, pieces.sizes, pieces.places))
    done = read(c_int32(file), c_int64(len(pieces.starts)), starts, sizes, c_void_p(_at(pieces.buffer)), places)
    return max(0, int(done))


def _at(array: NDArray[Any]) -> int:
    return array.ctypes.data
