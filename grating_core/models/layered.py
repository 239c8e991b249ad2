"""A layered model lets the engine embed tokens and run one layer at a time, whatever the model's head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grating_core.columns.fetching import Fetcher
from grating_core.kernels import reference
from grating_core.kernels.choice import kernels
from grating_core.kernels.operands import Lookup, Weight
from grating_core.layers import layer as plain
from grating_core.layers import packed_steps
from grating_core.layers.layer import Mlp
from grating_core.layers.linear import Weights, linear, normed
from grating_core.layers.packed import PackedLayer, norm_of
from grating_core.layers.packed_table import PackedTable
from grating_core.layers.relative import SCRATCH
from grating_core.layers.rotary import Angles, angles
from grating_core.layers.sending import sent
from grating_core.layers.spec import LayerSpec, Rotary
from grating_core.memory.checkpoint import Checkpoint
from grating_core.memory.meter import Meter
from grating_core.memory.rows import RowCache
from grating_core.memory.streamer import Streamer
from grating_core.models.family import Family, ModelSpec
from grating_core.models.layout import layer_by_role
from grating_core.models.packed_file import PackedFile
from grating_core.models.packing import Packing

_BLOCK = 512 * 1024  # bytes of a block of rows in a kernel, see kernels/src/linear.h


class Layer(NamedTuple):
    """This class holds what computing a layer takes.

    Attributes:
        spec: The layer's spec.
        weights: The layer's weights, by role, or packed.
        mlp: The function in the place of the layer's own MLP; None for its own.
        table: The table of relative positions, ``[rows, D]``; None for none.
    """

    spec: LayerSpec
    weights: Weights | PackedLayer
    mlp: Mlp | None = None
    table: Tensor | None = None

    @property
    def steps(self) -> Any:
        """The module with the steps of such a layer: by kernels if the weights are packed."""
        return packed_steps if isinstance(self.weights, PackedLayer) else plain

    @property
    def fills(self) -> bool:
        """Whether rows are filled up to one of few numbers, because torch makes and keeps a kernel for each."""
        return kernels().level is None or not isinstance(self.weights, PackedLayer)


class LosslessLayers(NamedTuple):
    """This class holds all layers of a model without 8 bits.

    Attributes:
        layers: Weights by role, or packed, by number from 1.
        packing: How they are packed; None if they are not.
    """

    layers: Mapping[int, Weights | PackedLayer]
    packing: Packing | None


@dataclass(frozen=True)
class Parts:
    """This class holds the parts of a layered model.

    Attributes:
        family: The description of the model's family.
        spec: The description of the model.
        device: The device that holds the weights and computes.
        dtype: The dtype of hidden states, and of weights that are not packed.
        meter: The counter of streamer, row cache and columns.
        outside: Weights around the layers by role, without the embedding table if there is a row cache.
        head: Weights of the head, by role.
        layers: Weights of the resident layers by role, or packed, by number from 1.
        streamer: Reader of the streamed layers' weights; None if no layer is streamed.
        rows: What gives rows in the place of the embedding table; None if the table is resident as it is.
        columns: What reads the columns of pruned MLPs; None if the MLPs are dense.
        mlps: The functions in the place of the layers' MLPs; empty if the MLPs are dense.
        packing: How the layers are packed; None if they are not.
        packed: The companion file with packed layers; None without one.
        output: The quantised output embedding of a language model; None for another.
        kv_bits: The bits of keys and values that are kept while text is generated; None for the dtype of states.
        lossless: The layers without 8 bits, beside those in 8 bits; None if they are not in memory.
        checkpoint: The files that streamer and row cache read; None without streamer and row cache.
    """

    family: Family
    spec: ModelSpec
    device: torch.device
    dtype: torch.dtype
    meter: Meter
    outside: Weights
    head: Weights
    layers: Mapping[int, Weights | PackedLayer]
    streamer: Streamer | None = None
    rows: RowCache | PackedTable | None = None
    columns: Fetcher | None = None
    mlps: Sequence[Mlp] = ()
    packing: Packing | None = None
    packed: PackedFile | None = None
    output: Weight | None = None
    kv_bits: int | None = None
    lossless: LosslessLayers | None = None
    checkpoint: Checkpoint | None = None

    def close(self) -> None:
        """Stop reading, and close the files."""
        for part in (self.streamer, self.columns, self.packed, self.checkpoint):
            if part is not None:
                part.close()


class LayeredModel:
    """A layered model has embeddings, layers and a head.

    Everything runs on a packed token axis without padding: hidden states are ``[T, D]`` in the compute dtype.
    T counts the tokens of all sequences together. Only one pass at a time may use the object if anything of it is
    read from disk, because a pass changes what is in memory for the next.

    Args:
        parts: The parts; :meth:`close` closes them.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.spec = parts.spec
        self.outside = parts.outside
        """The weights around the layers, by role."""
        self.head = parts.head
        """The weights of the head, by role."""
        self.meter = parts.meter
        self.device = parts.device
        self.dtype = parts.dtype
        """The dtype of hidden states."""
        self.packing = parts.packing
        """How the layers are packed; None if they are not."""
        self.products = torch.int8 if parts.packing is not None and parts.packing.formats else parts.dtype
        """The dtype of the layers' products."""
        self._factor = torch.tensor(parts.spec.scale, dtype=parts.dtype).item()  # rounded, as transformers does
        self._norm = norm_of(parts.spec.norm, parts.outside, "embedding_norm")
        self._relative = _relative(parts.spec, parts.outside)
        self.work = work_per_token(parts.spec, parts.dtype, parts.packing, pruned=parts.columns is not None)

    @property
    def depth(self) -> int:
        """The number of layers."""
        return self.spec.depth

    @property
    def width(self) -> int:
        """D, the width of the hidden states."""
        return self.spec.width

    @property
    def kernels(self) -> str:
        """The level of the compiled kernels that compute the layers; ``"torch"`` if torch does."""
        return (kernels().level if self._parts.packing is not None else None) or "torch"

    def prepare(self, input_ids: Tensor) -> None:
        """Read the embedding rows of a pass's tokens, int64 ``[T]``, as far as there is room for them."""
        if self._parts.rows is not None:
            self._parts.rows.fetch(input_ids)

    @contextmanager
    def layer(self, number: int) -> Iterator[Layer]:
        """Provide a layer, from 1 to :attr:`depth`, inside the ``with``. Ask for layers in rising order.

        Raises:
            FileError: The weights cannot be read from disk.
        """
        parts, spec, table = self._parts, self.spec.layers[number - 1], self._relative
        mlp = parts.mlps[number - 1] if parts.mlps else None
        if parts.streamer is None or number not in parts.streamer:
            yield Layer(spec, parts.layers[number], mlp, table)
            return
        with parts.streamer.layer(number) as stored:
            if parts.packed is not None and parts.packing is not None:
                yield Layer(spec, parts.packing.layer(spec, stored), mlp, table)
                return
            weights = layer_by_role(parts.family, spec, number, stored)
            if parts.packing is None:
                yield Layer(spec, weights, mlp, table)
            else:
                yield Layer(spec, parts.packing.packed(spec, weights, in_place=True), None, table)

    def rewind(self) -> None:
        """End a pass, so that the first layers of the next pass are read in advance."""
        if self._parts.columns is not None:
            self._parts.columns.drop()
        if self._parts.streamer is not None:
            self._parts.streamer.rewind()

    def close(self) -> None:
        """Stop reading, and close the files."""
        self._parts.close()

    def embed(self, input_ids: Tensor, token_type_ids: Tensor, positions: Tensor, output: Tensor) -> None:
        """Write the hidden states before the first layer.

        Args:
            input_ids: Token ids, int64 ``[T]``, on the CPU.
            token_type_ids: The types of the tokens, of the same kind.
            positions: The positions of the tokens, counted from 0 within each sequence, of the same kind.
            output: Where the states are written, ``[T, D]``.
        """
        outside, spec, rows = self.outside, self.spec, self._parts.rows
        if rows is None:
            found = [(outside["table.weight"], input_ids)]
        else:
            found = [(rows(input_ids), torch.arange(len(input_ids)))]
        if spec.types:
            types = token_type_ids if spec.typed else torch.zeros_like(token_type_ids)
            found.append((outside["types.weight"], types))
        if spec.positions:
            found.append((outside["positions.weight"][spec.first_position :], positions))
        lookups = [Lookup(table, sent(numbers, self.device)) for table, numbers in found]
        compiled = self.device.type == "cpu" and kernels().has(self.dtype)
        embed = kernels().embed if compiled else reference.embed
        if spec.row == spec.width:
            embed(lookups, self._factor, self._norm, output)
            return
        narrow = output.new_empty(len(output), spec.row)
        embed(lookups, self._factor, self._norm, narrow)
        output.copy_(linear(narrow, outside, "projection"))

    def angles(self, positions: Tensor) -> dict[Rotary, Angles]:
        """Return the angles at positions, int64 ``[T]``, for each kind of rotary positions that layers have."""
        kinds = {layer.rotary for layer in self.spec.layers if layer.rotary is not None}
        dtype = torch.float32 if self._parts.packing is not None else self.dtype
        return {rotary: angles(rotary, positions, dtype) for rotary in kinds}

    def normed(self, states: Tensor) -> Tensor:
        """Return states ``[…, D]`` in the head's dtype after the norm between the last layer and the head."""
        return normed(states, self.outside, "final_norm", self.spec.norm)


def _relative(spec: ModelSpec, outside: Weights) -> Tensor | None:
    """Return the table of relative positions as layers read it; None for none."""
    table = outside.get("relative.weight")
    return None if table is None else normed(table, outside, "relative_norm", spec.norm)


def work_per_token(
    spec: ModelSpec, dtype: torch.dtype, packing: Packing | None = None, *, pruned: bool = False
) -> int:
    """Return the most bytes of intermediate results that a layer has for one token.

    Args:
        spec: The description of the model.
        dtype: Dtype of the results.
        packing: How the layers are packed; None if they are not.
        pruned: Whether the layers' MLPs compute from columns, which sums parts of the products in float32.
    """
    layer = spec.layers[0]
    attended = layer.heads * layer.head_size
    widest = max(layer.inner, attended)
    if pruned:
        return (5 * widest + 8 * spec.width) * dtype.itemsize + 4 * 4 * widest
    if packing is not None and kernels().level is not None:
        # What an MLP has inside never is there for all tokens. There are queries and what attention gave, keys and
        # values, normed states, and what a lens copies.
        states = 2 * (attended + layer.key_heads * layer.head_size + spec.width) * dtype.itemsize
        return states + (attended + spec.width if packing.formats else 0)
    if packing is not None:
        # Torch has products of 8 bits, and what follows them, in full float32.
        return 16 * widest + 8 * spec.width * dtype.itemsize
    # A gated MLP has two products of the inner width. Hidden states, queries, keys, values and what attention gave
    # come on top.
    return ((2 if layer.gated else 1) * widest + 8 * spec.width) * dtype.itemsize


def kernels_work(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Return the bytes that compiled kernels take beside intermediate results, whatever the number of tokens."""
    layer = spec.layers[0]
    widest = max(layer.inner, layer.heads * layer.head_size)
    scratch = 2 * (_BLOCK + 4 * 32 * widest * dtype.itemsize)
    if layer.relative is not None:
        # One head of keys and queries of positions, with a column for each distance; and what comes of them.
        scratch += (spec.window + 64) * (4 * (layer.head_size + 16) * dtype.itemsize + 4 * 192)
    return torch.get_num_threads() * scratch


def relative_bytes(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Return the bytes that relative positions take: a normed table, keys and queries, and torch's scratch."""
    if not spec.relative:
        return 0
    layer, scratch = spec.layers[0], 0 if kernels().level is not None else SCRATCH
    return spec.relative * (spec.width + 2 * layer.heads * layer.head_size) * dtype.itemsize + scratch


def unpacked_bytes(spec: ModelSpec) -> int:
    """Return the bytes that torch takes to unpack the largest matrix of 8 bits."""
    layer = spec.layers[0]
    return 3 * max(layer.inner, layer.heads * layer.head_size) * spec.width
