"""One token through layers of a decoder: what the kernel takes, and the compiled kernel.

What lasts longer than a token is brought into the kernel's structs once: a :class:`Stack` of layers, and the
:class:`Memories` of a sequence.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import Structure, c_float, c_int32, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from grating_core.kernels.loading import DTYPES, started
from grating_core.kernels.operands import Norm, Weight
from grating_core.kernels.structs import (
    ACTIVATIONS,
    NormStruct,
    WeightStruct,
    address,
    check,
    norm_struct,
    weight_struct,
)

_PRODUCTS = ("query", "key", "value", "output", "gate", "up", "down")
_NORMS = ("input_norm", "query_norm", "key_norm", "attention_norm", "mlp_norm", "output_norm")


class TokenLayer(NamedTuple):
    """This class describes a layer of a decoder.

    Attributes:
        products: Weights of any format by role: query, key, value, output, gate (perhaps), up and down. The last
            layer of a stack may lack the latter three, if its MLP is computed elsewhere.
        norms: Norms by role; those that the layer lacks are not there.
        heads: Number of heads of the query.
        key_heads: Number of heads of keys and values.
        head_size: Number of entries of a head.
        activation: The name of the MLP's activation.
        scaling: The factor of the products of queries and keys.
        window: Distance in tokens below which a token sees another; None for any distance.
        softcap: Bound of the scaled products, by a hyperbolic tangent; None for no bound.
        factor: The factor of what attention and MLP add to the states.
        angles: Which of a token's angles queries and keys turn by; None for none.
    """

    products: Mapping[str, Weight]
    norms: Mapping[str, Norm]
    heads: int
    key_heads: int
    head_size: int
    activation: str
    scaling: float
    window: int | None = None
    softcap: float | None = None
    factor: float = 1.0
    angles: int | None = None


class Memory(NamedTuple):
    """A memory holds the keys and values of a sequence in one layer, with room for more.

    Attributes:
        key: Keys, ``[tokens, key heads, head size]``, contiguous: bfloat16, float32, or int8 with scales.
        value: Values of the same shape.
        key_scale: Scales of int8 keys, float32 ``[tokens, key heads]``: entry q is ``scale * q``. Else None.
        value_scale: Scales of int8 values, likewise.
    """

    key: Tensor
    value: Tensor
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None


class Output(NamedTuple):
    """An output makes logits of the states behind the last layer.

    Attributes:
        norm: The norm before it; None for none.
        head: The output embedding: a packed weight, or the matrix ``[V, D]`` of bfloat16 or float32.
    """

    norm: Norm | None
    head: Weight | Tensor


class _LayerStruct(Structure):
    """This class mirrors ``gk_token_layer``."""

    _fields_ = [
        *((role, WeightStruct) for role in _PRODUCTS),
        *((role, NormStruct) for role in _NORMS),
        ("heads", c_int64),
        ("key_heads", c_int64),
        ("head_size", c_int64),
        ("window", c_int64),
        ("activation", c_int32),
        ("angles", c_int32),
        ("scaling", c_float),
        ("softcap", c_float),
        ("factor", c_float),
    ]


class _MemoryStruct(Structure):
    """This class mirrors ``gk_memory``."""

    _fields_ = [
        ("key", c_void_p),
        ("value", c_void_p),
        ("key_scale", c_void_p),
        ("value_scale", c_void_p),
        ("stride", c_int64),
        ("dtype", c_int32),
    ]


class _TokenStruct(Structure):
    """This class mirrors ``gk_token``."""

    _fields_ = [
        ("width", c_int64),
        ("count", c_int64),
        ("tokens", c_int64),
        ("layers", c_void_p),
        ("memory", c_void_p),
        ("cosine", c_void_p),
        ("sine", c_void_p),
        ("row", c_void_p),
        ("final_norm", NormStruct),
        ("head", WeightStruct),
        ("table", c_int32),
        ("logits", c_void_p),
        ("normed", c_void_p),
    ]


class Stack:
    """A stack is consecutive layers of a decoder.

    Args:
        layers: The layers, the first one first.
    """

    def __init__(self, layers: Sequence[TokenLayer]) -> None:
        self.layers = tuple(layers)
        self.structs = (_LayerStruct * len(self.layers))(*map(_layer, self.layers))

    def __len__(self) -> int:
        return len(self.layers)


class Memories:
    """This class has the memories of a sequence in all layers.

    Args:
        each: The memory of each layer.
    """

    def __init__(self, each: Sequence[Memory]) -> None:
        self.each = tuple(each)
        self.structs = (_MemoryStruct * len(self.each))(*map(_memory, self.each))


def token(
    row: Tensor,
    stack: Stack,
    memories: Memories,
    first: int,
    tokens: int,
    angles: Sequence[tuple[Tensor, Tensor]],
    output: Output | None = None,
    normed: Tensor | None = None,
) -> Tensor | None:
    """See :func:`grating_core.kernels.token_reference.token`. Angles are contiguous."""
    logits = None
    if output is not None:
        columns = output.head.columns if isinstance(output.head, Weight) else len(output.head)
        logits = torch.empty(columns)
    cosine = (c_void_p * len(angles))(*(one.data_ptr() for one, _ in angles))
    sine = (c_void_p * len(angles))(*(one.data_ptr() for _, one in angles))
    call = _TokenStruct(
        len(row),
        len(stack),
        tokens,
        ctypes.addressof(stack.structs),
        ctypes.addressof(memories.structs) + first * ctypes.sizeof(_MemoryStruct),
        ctypes.addressof(cosine),
        ctypes.addressof(sine),
        row.data_ptr(),
        norm_struct(None if output is None else output.norm),
        WeightStruct() if output is None else _head(output.head),
        output is not None and isinstance(output.head, Tensor),
        address(logits),
        address(normed),
    )
    lib = started()
    check(lib.gk_run_token(ctypes.byref(call)))
    return logits


def _layer(layer: TokenLayer) -> _LayerStruct:
    products = (layer.products.get(role) for role in _PRODUCTS)
    return _LayerStruct(
        *(WeightStruct() if weight is None else weight_struct(weight) for weight in products),
        *(norm_struct(layer.norms.get(role)) for role in _NORMS),
        layer.heads,
        layer.key_heads,
        layer.head_size,
        layer.window or 0,
        ACTIVATIONS[layer.activation],
        -1 if layer.angles is None else layer.angles,
        layer.scaling,
        layer.softcap or 0.0,
        layer.factor,
    )


def _memory(memory: Memory) -> _MemoryStruct:
    return _MemoryStruct(
        memory.key.data_ptr(),
        memory.value.data_ptr(),
        address(memory.key_scale),
        address(memory.value_scale),
        memory.key.stride(0),
        DTYPES[memory.key.dtype],
    )


def _head(head: Weight | Tensor) -> WeightStruct:
    if isinstance(head, Weight):
        return weight_struct(head)
    return WeightStruct(head.data_ptr(), None, None, None, None, None, *head.shape, DTYPES[head.dtype])
