"""Models of any shape with made-up weights: the engine itself runs them, so that its times can be measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from grating_core.columns.companion import ColumnSizes, contents, tables
from grating_core.kernels.columns import pack_columns
from grating_core.kernels.operands import Weight
from grating_core.lab.shape import Form, Shape
from grating_core.layers.large_pages import in_large_pages
from grating_core.layers.layer import Mlp
from grating_core.layers.linear import Weights
from grating_core.layers.packed import PackedLayer, layout_of_weight, weight_of
from grating_core.layers.packed_table import PackedTable
from grating_core.memory.checkpoint import SECTOR, Checkpoint
from grating_core.memory.companion import checksum, write_companion
from grating_core.memory.group import TensorGroup
from grating_core.memory.meter import Meter
from grating_core.memory.streamer import Streamer
from grating_core.models.layered import Parts
from grating_core.models.layout import (
    head_by_role,
    head_names,
    layer_by_role,
    layer_names,
    layer_roles,
    outside_by_role,
    outside_names,
)
from grating_core.models.packed_file import layer_bytes, open_packed

NAME = "made-up"
"""The fingerprint of made-up weights."""
_CPU = torch.device("cpu")
_MLP = frozenset(("up", "gate", "down"))
_BLOCK = 1 << 20  # numbers that are drawn; more repeat them


def make_parts(shape: Shape, form: Form, depth: int, mlps: Sequence[Mlp] = ()) -> Parts:
    """Return a model with all its weights in memory, or without those of its MLPs.

    Args:
        shape: The model's shape.
        form: One of the shape's forms.
        depth: Number of layers, at most those of the model.
        mlps: What stands in the place of each layer's MLP; empty for its own.
    """
    spec, packing = replace(shape.spec, layers=shape.spec.layers[:depth]), form.packing
    layers = dict(zip(range(1, depth + 1), _layers(shape, form, depth), strict=True))
    names = outside_names(shape.family, spec)
    output = None if packing is None or packing.output is None else _output(shape, form)
    outside = outside_by_role(shape.family, spec, _tensors(names, shape.dtype))
    head = head_by_role(shape.family, spec, _tensors(head_names(shape.family, spec), shape.dtype))
    if shape.tied:
        head = {"vocabulary.weight": outside["table.weight"]}
    return Parts(
        shape.family, spec, _CPU, shape.dtype, Meter(), outside, head, layers,
        mlps=mlps, packing=packing, output=output, kv_bits=shape.kv_bits,
        rows=PackedTable(output, shape.dtype) if output is not None and shape.tied else None,
    )  # fmt: skip


def stream_parts(parts: Parts, shape: Shape, path: Path) -> Parts:
    """Return the same model, all layers of which are streamed from a file that is written now."""
    packing = parts.packing
    if packing is not None and packing.quantized:
        layouts = [packing.layout(parts.family, layer) for layer in parts.spec.layers]

        def tensors() -> Iterator[Mapping[str, Tensor]]:
            for layout in layouts:
                yield {name: _drawn(size, dtype) for name, (dtype, size) in layout.items()}

        file = open_packed(path, layouts, NAME, tensors)
        return replace(parts, layers={}, packed=file, streamer=Streamer(file.groups, _CPU, parts.meter))
    # Weights are stored in full where reading converts them.
    dtype = torch.float32 if shape.dense.sizes.converted else shape.dtype
    names = [_names(shape, number, pruned=bool(parts.mlps)) for number in range(1, parts.spec.depth + 1)]
    save_file({name: tensor for own in names for name, tensor in _tensors(own, dtype).items()}, path)
    checkpoint = Checkpoint([path], lasting=True)
    groups = {
        number: TensorGroup(
            checkpoint, {name: checkpoint.tensors[name] for name in own}, dict.fromkeys(own, shape.dtype)
        )
        for number, own in enumerate(names, 1)
    }
    return replace(parts, layers={}, checkpoint=checkpoint, streamer=Streamer(groups, _CPU, parts.meter))


def write_made_up_columns(path: Path, sizes: ColumnSizes) -> None:
    """Write a companion file with made-up columns."""

    def parts() -> Iterator[memoryview]:
        checks = []
        for _, kind in tables(sizes):
            form = sizes.form(kind)
            row = pack_columns(_drawn((1, form.length), torch.float32), form)[0]
            yield np.tile(row, sizes.count(kind)).data
            checks += [checksum(row)] * sizes.count(kind)
        yield np.array(checks, dtype="<u8").data
        for _, kind in tables(sizes):
            yield np.arange(sizes.count(kind), dtype="<i8").data
        yield memoryview(bytes(SECTOR))

    write_companion(path, contents(sizes), NAME, parts())


def _layers(shape: Shape, form: Form, depth: int) -> Iterator[Weights | PackedLayer]:
    packing, pruned = form.packing, form is shape.pruned
    if packing is None:
        yield from (_by_role(shape, number, pruned=pruned) for number in range(1, depth + 1))
        return

    def packed() -> Iterator[PackedLayer]:
        for number, spec in enumerate(shape.spec.layers[:depth], 1):
            if packing.quantized:
                layout = packing.layout(shape.family, spec)
                yield packing.layer(spec, {name: _drawn(size, dtype) for name, (dtype, size) in layout.items()})
            else:
                yield packing.packed(spec, _by_role(shape, number, pruned=pruned))

    sizes = (layer_bytes(packing.layout(shape.family, spec)) for spec in shape.spec.layers[:depth])
    yield from in_large_pages(packed(), sum(sizes))


def _by_role(shape: Shape, number: int, *, pruned: bool) -> Weights:
    tensors = _tensors(_names(shape, number, pruned=pruned), shape.dtype)
    return layer_by_role(shape.family, shape.spec.layers[number - 1], number, tensors)


def _names(shape: Shape, number: int, *, pruned: bool) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of a layer's tensors, without those of a pruned MLP."""
    family, spec = shape.family, shape.spec.layers[number - 1]
    apart = {
        f"{family.layers}.{number - 1}.{name}.weight"
        for name, roles in layer_roles(family, spec)
        if pruned and not _MLP.isdisjoint(roles)
    }
    return {name: size for name, size in layer_names(family, spec, number).items() if name not in apart}


def _output(shape: Shape, form: Form) -> Weight:
    packing, spec = form.packing, shape.spec
    assert packing is not None
    layout = layout_of_weight(spec.vocabulary, spec.width, packing.states, packing.output)
    fields = {name: _drawn(size, dtype) for name, (dtype, size) in layout.items()}
    return weight_of(fields, packing.states, spec.vocabulary, spec.width)


def _tensors(names: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: _drawn(size, dtype) for name, size in names.items()}


def _drawn(size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return small numbers, or any bytes, drawn at random. Many numbers repeat themselves."""
    count, chance = prod(size), torch.Generator().manual_seed(0)
    if dtype == torch.int8:
        some = torch.randint(-128, 128, (min(count, _BLOCK),), dtype=dtype, generator=chance)
    else:
        some = (torch.randn(min(count, _BLOCK), generator=chance) * 0.02).to(dtype)
    return some.repeat(-(-count // max(1, len(some))))[:count].view(*size)
