"""Blocks of GGUF files are packed for kernels, and keep their entries as far as a format of groups has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from grating_core.kernels.groups import GROUP, pack_groups, quantized_groups
from grating_core.kernels.operands import Weight
from grating_core.layers.packed import Format, fields_of, layout_of_weight, quantized_weight, weight_of
from grating_core.layers.spec import Role
from grating_core.memory.blocks import groups_of
from grating_core.memory.checkpoint import aligned_buffer
from grating_core.memory.group import PIECE, TensorGroup
from grating_core.memory.header import StoredTensor
from grating_core.models.family import Family, ModelSpec
from grating_core.models.layout import layer_roles

_AT_ONCE = 1 << 18  # entries that are packed at a time, which takes some bytes for each
ROWS = 4096
"""The number of rows of a matrix that are read at a time to be packed."""

FORMATS: Mapping[str, Format] = {
    "Q8_0": Format(8, grouped=True),
    "Q5_0": Format(8, grouped=True),
    "Q6_K": Format(8, grouped=True),
    "Q5_1": Format(8, grouped=True, minima=True),
    "Q5_K": Format(8, grouped=True, minima=True),
    "Q4_0": Format(4, grouped=True),
    "Q4_1": Format(4, grouped=True, minima=True),
    "Q4_K": Format(4, grouped=True, minima=True),
}
"""The format of each type of blocks. Only Q6_K, whose groups are of 16 entries, is quantised again."""


def packed_blocks(kind: str, rows: Tensor, inner: int, bias: Tensor | None = None) -> Weight:
    """Pack a matrix that is stored in blocks.

    Args:
        kind: The type of the blocks.
        rows: The matrix as it is stored, uint8 ``[columns, bytes]``.
        inner: Number of entries of a row.
        bias: What is added to the columns, ``[columns]``; None for nothing.
    """
    format, columns = FORMATS[kind], len(rows)
    layout = layout_of_weight(columns, inner, torch.float32, format, biased=bias is not None)
    fields = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in layout.items()}
    ends = dict.fromkeys(fields, 0)
    step = max(1, _AT_ONCE // inner // 32) * 32
    for first in range(0, columns, step):
        part = rows[first : first + step]
        of_part = None if bias is None else bias[first : first + step]
        for name, tensor in fields_of(pack_groups(format.bits, *_entries(kind, part, inner), of_part)).items():
            start, ends[name] = ends[name], ends[name] + tensor.numel()
            fields[name].view(-1)[start : ends[name]] = tensor.view(-1)
    return weight_of(fields, torch.float32, columns, inner)


def _entries(kind: str, rows: Tensor, inner: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return entries, scales and minima as groups of 32 have them."""
    entries, scale, minimum = groups_of(kind, rows.flatten(), inner)
    if entries.shape[-1] != GROUP:
        return quantized_groups((entries * scale[..., None]).flatten(1), 8)
    if FORMATS[kind] == Format(4, grouped=True):
        entries = entries + 8
    return entries.clamp(min=-127).flatten(1), scale, minimum


EXACT = FORMATS.keys() - {"Q4_K", "Q5_K", "Q6_K"}
"""The types of blocks that lose nothing at all; scales of two factors are rounded to 16 bits."""


class Rows(NamedTuple):
    """Rows are consecutive rows of a matrix on disk.

    Attributes:
        group: What reads them, as floats or as they are stored.
        kind: The type of the blocks that they keep; None for floats.
        length: Number of rows; a multiple of 32, unless they are the last ones.
    """

    group: TensorGroup
    kind: str | None
    length: int


def packed_rows(parts: Sequence[Rows], inner: int, states: torch.dtype, format: Format) -> Weight:
    """Pack a matrix. Some rows at a time are in memory as they are on disk.

    Args:
        parts: The rows, in order.
        inner: Number of entries of a row.
        states: The dtype of states.
        format: The format of the weight.

    Raises:
        FileError: The weights cannot be read.
    """
    staging = aligned_buffer(PIECE)
    buffer = aligned_buffer(max(part.group.size for part in parts))
    columns = sum(part.length for part in parts)
    layout = layout_of_weight(columns, inner, states, format)
    whole = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in layout.items()}
    ends = dict.fromkeys(whole, 0)
    for group, kind, _ in parts:
        group.read(buffer, staging)
        (matrix,) = group.views(buffer).values()
        part = quantized_weight(matrix, None, format) if kind is None else packed_blocks(kind, matrix, inner)
        for name, tensor in fields_of(part).items():
            start, ends[name] = ends[name], ends[name] + tensor.numel()
            whole[name].view(-1)[start : ends[name]] = tensor.view(-1)
    return weight_of(whole, states, columns, inner)


def rows_of(
    whole: StoredTensor,
    group: Callable[[StoredTensor], TensorGroup],
    step: int = ROWS,
    *,
    in_blocks: bool = True,
) -> list[Rows]:
    """Return a matrix on disk in parts of some rows each.

    Args:
        whole: The matrix.
        group: Function that returns what reads a part.
        step: Number of rows of a part; a multiple of 32, unless there is one part.
        in_blocks: Whether the rows keep their blocks.
    """
    parts = []
    for first in range(0, whole.shape[0], step):
        part = whole.rows(first, first + step)
        stored = part.as_bytes() if in_blocks else part
        parts.append(Rows(group(stored), whole.kind if in_blocks else None, part.shape[0]))
    return parts


def as_bytes(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return those tensors that keep their blocks, as bytes."""
    return {name: tensor.as_bytes() for name, tensor in tensors.items() if keeps_blocks(tensor)}


def keeps_blocks(tensor: StoredTensor) -> bool:
    """Tell whether a tensor is a matrix in blocks that are packed as they are."""
    return len(tensor.shape) == 2 and tensor.kind in FORMATS


def kinds_of(family: Family, spec: ModelSpec, tensors: Mapping[str, StoredTensor]) -> tuple[dict[Role, str], ...]:
    """Return what the products of each layer are stored as, by role, where these are blocks."""
    found = []
    for number, layer in enumerate(spec.layers, 1):
        kinds: dict[Role, str] = {}
        for name, roles in layer_roles(family, layer):
            stored = tensors[f"{family.layers}.{number - 1}.{name}.weight"]
            kinds |= dict.fromkeys(roles, stored.kind) if keeps_blocks(stored) else {}
        found.append(kinds)
    return tuple(found)
