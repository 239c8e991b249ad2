"""The compiled kernels of dynamic input pruning. :mod:`grating_core.kernels.columns` says what each does."""

from __future__ import annotations

from ctypes import Structure, byref, c_double, c_float, c_int32, c_int64, c_void_p

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from grating_core.kernels.columns import Choice, RowFormat
from grating_core.kernels.loading import DTYPES, started
from grating_core.kernels.structs import array_address

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


class _Choice(Structure):
    """This class mirrors ``gk_choice``."""

    _fields_ = [
        ("values", c_void_p),
        ("columns", c_int64),
        ("resident", c_int64),
        ("count", c_int64),
        ("preference", c_float),
        ("cost", c_double),
        ("places", c_void_p),
        ("used", c_int64),
        ("hits", c_int64),
    ]


def add_columns(
    form: RowFormat, table: Tensor, places: NDArray[np.int64], values: NDArray[np.float32], output: Tensor
) -> None:
    """See :func:`grating_core.kernels.columns.add_columns`."""
    started().gk_run_columns(byref(_columns(form, table, places, array_address(values), output.data_ptr())))


def unpack_columns(form: RowFormat, table: Tensor, places: NDArray[np.int64], output: Tensor) -> None:
    """See :func:`grating_core.kernels.columns.unpack_columns`. The output is contiguous."""
    call = _columns(form, table, places, None, None)
    started().gk_unpack_columns(byref(call), c_int32(DTYPES[output.dtype]), c_void_p(output.data_ptr()))


def _columns(
    form: RowFormat, table: Tensor, places: NDArray[np.int64], values: int | None, output: int | None
) -> _Columns:
    number = DTYPES[form.dtype] if form.bits is None else _GROUPED[form.bits]
    return _Columns(number, form.length, len(places), table.data_ptr(), array_address(places), values, output)


def choose(values: NDArray[np.float32], resident: int, count: int, preference: float, cost: float) -> Choice:
    """See :func:`grating_core.kernels.columns.choose`."""
    columns = len(values)
    values = np.ascontiguousarray(values, dtype=np.float32)
    places = np.empty(columns, dtype=np.int64)
    choice = _Choice(
        array_address(values),
        columns,
        resident,
        min(count, columns),
        preference,
        cost,
        array_address(places),
    )
    if started().gk_choose(byref(choice)):
        raise MemoryError("The kernels got no memory for choosing columns.")
    return Choice(places[: choice.used], choice.hits)
