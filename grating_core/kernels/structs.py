"""The structs of the compiled kernels' C interface, as kernels/src/kernels.h has them, and what fills them."""

from __future__ import annotations

from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from grating_core.kernels.loading import DTYPES
from grating_core.kernels.operands import Norm, Weight

ACTIVATIONS: dict[str | None, int] = {
    None: 0,
    "gelu": 1,
    "gelu_new": 2,
    "gelu_pytorch_tanh": 2,
    "silu": 3,
    "swish": 3,
    "relu": 4,
    "tanh": 5,
}
"""The numbers that the C interface has for activations."""

_GROUPED = {8: 3, 4: 4}  # the numbers of grouped formats by their bits
_ZEROS = 5  # that of 4 bits with zeros
_NORMS = {"layer": 1, "rms": 2}
_NO_ROW = 2


class NormStruct(Structure):
    """This class mirrors ``gk_norm``."""

    _fields_ = [("kind", c_int32), ("eps", c_float), ("offset", c_float), ("weight", c_void_p), ("bias", c_void_p)]


class WeightStruct(Structure):
    """This class mirrors ``gk_weight``."""

    _fields_ = [
        ("packed", c_void_p),
        ("scale", c_void_p),
        ("minimum", c_void_p),
        ("factor", c_void_p),
        ("sums", c_void_p),
        ("bias", c_void_p),
        ("columns", c_int64),
        ("inner", c_int64),
        ("format", c_int32),
    ]


class RowsStruct(Structure):
    """This class mirrors ``gk_rows``."""

    _fields_ = [("data", c_void_p), ("stride", c_int64), ("scale", c_void_p)]


class LinearStruct(Structure):
    """This class mirrors ``gk_linear``."""

    _fields_ = [
        ("dtype", c_int32),
        ("states", c_int32),
        ("activation", c_int32),
        ("factor", c_float),
        ("rows", c_int64),
        ("x", RowsStruct),
        ("weight", WeightStruct),
        ("gate", WeightStruct),
        ("first_norm", NormStruct),
        ("norm", NormStruct),
        ("residual", RowsStruct),
        ("total", RowsStruct),
        ("output", RowsStruct),
        ("quantised", RowsStruct),
    ]


class AttentionStruct(Structure):
    """This class mirrors ``gk_attention``, whose spans are the numbers of :class:`~.operands.Span`."""

    _fields_ = [
        ("states", c_int32),
        ("causal", c_int32),
        ("heads", c_int64),
        ("key_heads", c_int64),
        ("head_size", c_int64),
        ("window", c_int64),
        ("scaling", c_float),
        ("softcap", c_float),
        ("query", c_void_p),
        ("query_stride", c_int64),
        ("key", c_void_p),
        ("key_stride", c_int64),
        ("value", c_void_p),
        ("value_stride", c_int64),
        ("shared_key", c_void_p),
        ("shared_key_stride", c_int64),
        ("shared_value", c_void_p),
        ("shared_value_stride", c_int64),
        ("output", c_void_p),
        ("output_stride", c_int64),
        ("spans", POINTER(c_int64)),
        ("count", c_int64),
        ("position_key", c_void_p),
        ("position_key_stride", c_int64),
        ("position_query", c_void_p),
        ("position_query_stride", c_int64),
        ("position_rows", c_void_p),
        ("reach", c_int64),
    ]


class LookupStruct(Structure):
    """This class mirrors ``gk_lookup``."""

    _fields_ = [("table", c_void_p), ("count", c_int64), ("rows", c_void_p)]


class EmbedStruct(Structure):
    """This class mirrors ``gk_embed``."""

    _fields_ = [
        ("states", c_int32),
        ("tables", c_int32),
        ("factor", c_float),
        ("count", c_int64),
        ("width", c_int64),
        ("lookups", LookupStruct * 3),
        ("norm", NormStruct),
        ("output", RowsStruct),
    ]


class FeaturesStruct(Structure):
    """This class mirrors ``gk_features``, whose sequences are the numbers of :class:`~.operands.Texts`."""

    _fields_ = [
        ("states", c_int32),
        ("pooling", c_int32),
        ("similarities", c_int32),
        ("width", c_int64),
        ("stride", c_int64),
        ("prefix", c_void_p),
        ("own", c_void_p),
        ("sequences", POINTER(c_int64)),
        ("count", c_int64),
        ("output", c_void_p),
        ("output_stride", c_int64),
    ]


_NO_NORM = NormStruct()


def check(failed: int) -> None:
    """Raise an error if a function of the C interface failed."""
    if failed == _NO_ROW:
        raise IndexError("A table of embeddings lacks the row of a token.")
    if failed:
        raise MemoryError("The kernels got no memory for intermediate results.")


def address(tensor: Tensor | None) -> int | None:
    """Return where a tensor's memory begins; None for none."""
    return None if tensor is None else tensor.data_ptr()


def array_address(array: NDArray[Any]) -> int:
    """Return where an array's memory begins."""
    return array.ctypes.data


def weight_struct(weight: Weight) -> WeightStruct:
    """Return the struct of a weight."""
    return WeightStruct(
        weight.packed.data_ptr(),
        address(weight.scale),
        address(weight.minimum),
        address(weight.factor),
        address(weight.sums),
        address(weight.bias),
        weight.columns,
        weight.inner,
        _format(weight),
    )


def _format(weight: Weight) -> int:
    """Return the number of a weight's format."""
    if weight.factor is not None:
        return _ZEROS
    return DTYPES[weight.dtype] if weight.bits is None else _GROUPED[weight.bits]


def norm_struct(norm: Norm | None) -> NormStruct:
    """Return the struct of a norm; None for none."""
    return (
        _NO_NORM
        if norm is None
        else NormStruct(_NORMS[norm.kind], norm.eps, norm.offset, norm.weight.data_ptr(), address(norm.bias))
    )
