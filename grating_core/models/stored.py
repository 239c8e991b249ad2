"""A stored model knows its files before its weights are read, and reads as many weights as a plan says."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from grating_core.kernels.choice import kernels
from grating_core.layers.large_pages import in_large_pages
from grating_core.layers.linear import Weights
from grating_core.layers.packed import PackedLayer
from grating_core.layers.packed_table import PackedTable
from grating_core.lifetime import closed_on_error
from grating_core.memory.checkpoint import aligned_buffer
from grating_core.memory.group import PIECE, TensorGroup
from grating_core.memory.header import DTYPES, StoredTensor
from grating_core.memory.meter import Meter
from grating_core.memory.plan import MemoryPlan, ModelSizes
from grating_core.memory.rows import RowCache
from grating_core.memory.streamer import Streamer
from grating_core.models import as_stored
from grating_core.models.adapter import Adapter
from grating_core.models.as_stored import EXACT, FORMATS, ROWS, Rows, packed_rows, rows_of
from grating_core.models.directory import blaming_weights, is_gguf
from grating_core.models.files import find_config, fitting_tensors, open_weights
from grating_core.models.identity import fingerprint
from grating_core.models.layered import Parts, kernels_work, relative_bytes, unpacked_bytes, work_per_token
from grating_core.models.layout import (
    Shape,
    head_by_role,
    head_names,
    layer_by_role,
    layer_names,
    outside_by_role,
    outside_name,
    outside_names,
    with_tied,
)
from grating_core.models.packed_file import PackedFile
from grating_core.models.packing import PackedLayers, Packing

OUTPUT = "lm_head.weight"
"""The name of a decoder's output embedding."""


class StoredModel(ABC):
    """This class holds a model's files whose configuration and headers have been read, but no weights.

    Args:
        directory: A model in Hugging Face layout with safetensors weights, or a GGUF file.
        device: The device that the weights will go to.
        dtype: The compute dtype of embeddings and layers.
        lasting: Whether weights will be read again while requests run; see :class:`Checkpoint`.
        adapter: An adapter that is merged into the weights whenever they are read; None for none.

    Raises:
        ModelNotFoundError: Configuration or weights are missing, damaged or incomplete.
        UnsupportedModelError: grating does not run this architecture, or the adapter is for another model.
    """

    def __init__(
        self,
        directory: Path,
        *,
        device: torch.device,
        dtype: torch.dtype,
        lasting: bool = False,
        adapter: Adapter | None = None,
    ) -> None:
        self.directory, self.device, self.dtype = directory, device, dtype
        self.adapter = adapter
        self.config = find_config(directory)
        self.family, self.spec = self.config.family, self.config.spec
        self._check_family()
        self._checkpoint, tensors = open_weights(directory, self.config, lasting=lasting)
        with closed_on_error(self._checkpoint):
            self._take(tensors)

    _cut = ""  # what distinguishes the model from one with all layers, in the names of companion files

    def close(self) -> None:
        """Close the files. A model that was loaded from them can then read no more weights."""
        self._checkpoint.close()

    @property
    def window(self) -> int:
        """The most tokens that the model can take."""
        return self.spec.window

    @property
    def vocabulary(self) -> int:
        """The number of rows of the embedding table."""
        return self.spec.vocabulary

    def sizes(self, window: int, packing: Packing | None = None) -> ModelSizes:
        """Return the sizes of the model's parts in memory.

        Args:
            window: The number of tokens of the longest pair.
            packing: How the layers are packed; None for without a loss.
        """
        spec, layer, adapter = self.spec, self.spec.layers[0], self.adapter.size if self.adapter else 0
        # Of pruned layers, kernels compute what is quantised.
        compiled = self.device.type == "cpu" and kernels().has(self.dtype) and (packing or not self._apart())
        sizes = ModelSizes(
            layers=tuple(group.size for group in self._layers.values()),
            bytes_read=tuple(group.bytes_read for group in self._layers.values()),
            vocabulary=spec.vocabulary,
            row=spec.row * self.dtype.itemsize,
            rest=sum(group.size for group in self._rest(window)) + adapter + relative_bytes(spec, self.dtype),
            converted=any(group.converts for group in self._layers.values()),
            hidden=spec.width * self.dtype.itemsize,
            work=work_per_token(spec, self.dtype, self._packing, pruned=bool(self._apart())),
            window=window,
            keys=window * 2 * layer.key_heads * layer.head_size * self.dtype.itemsize,
            kernels=kernels_work(spec, self.dtype) if compiled else 0,
        )
        if (packing := packing or self._as_stored) is None:
            return sizes
        packed, work = self._packed(packing), work_per_token(spec, self.dtype, packing, pruned=bool(self._apart()))
        rest = sizes.rest + (0 if sizes.kernels else unpacked_bytes(spec))
        sizes = replace(sizes, layers=packed.sizes, bytes_read=packed.sizes, work=work, rest=rest)
        return replace(sizes, converted=False, writing=packed.writing)

    def _check_family(self) -> None:  # noqa: B027 - a subclass need not refuse any family
        """Refuse a family that the subclass cannot use."""

    @property
    @abstractmethod
    def _head_dtype(self) -> torch.dtype:
        """The dtype that the head computes in."""

    def _head_shapes(self) -> dict[str, Shape]:
        """Return the shapes of the head's tensors that are read with the other weights, by name."""
        return head_names(self.family, self.spec)

    def _apart(self) -> Collection[str]:
        """Return the names of weights of layers that are not read with their layer."""
        return ()

    def _take(self, tensors: Mapping[str, StoredTensor]) -> None:
        """Take those of the stored tensors that the model needs."""
        family, spec = self.family, self.spec
        self._table = outside_name(family, "table")
        stored = with_tied(tensors, self._table, OUTPUT) if spec.tied else tensors
        in_layers = [layer_names(family, layer, number) for number, layer in enumerate(spec.layers, 1)]
        outside, head = outside_names(family, spec), self._head_shapes()
        wanted = {name: shape for names in (*in_layers, outside, head) for name, shape in names.items()}
        self._tensors = self._match(stored, wanted)
        self._sort([list(names) for names in in_layers], list(outside), list(head))
        if self.adapter is not None:
            # GGUF files have some families' norms plus one, and adapters have not.
            norm = {outside_name(family, "final_norm")} if is_gguf(self.directory) else set()
            self.adapter.check(self._shapes(), {*self._head, OUTPUT} - norm, self._table)

    def _match(self, stored: Mapping[str, StoredTensor], wanted: Mapping[str, Shape]) -> dict[str, StoredTensor]:
        """Return the stored tensor for each wanted name."""
        return fitting_tensors(self.directory, self.family, stored, wanted)

    def _shapes(self) -> dict[str, Shape]:
        """Return the shapes of all weights that an adapter may change."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def _sort(self, in_layers: list[list[str]], outside: list[str], head: list[str]) -> None:
        """Group the tensors that are read together."""
        apart = self._apart()
        self._in_layers = [[name for name in names if name not in apart] for names in in_layers]
        self._layers = {number: self._group(names, self.dtype) for number, names in enumerate(self._in_layers, 1)}
        # The norm before the head computes in the head's dtype.
        last = outside_name(self.family, "final_norm").removesuffix("weight")
        norm = [name for name in outside if last and name.startswith(last)]
        self._head = [*head, *norm]
        read = [name for name in self._head if name not in self._not_read()]
        others = [name for name in outside if name not in norm and name != self._table]
        self._always = [(read, self._head_dtype), (others, self.dtype)]
        self._tables = [self._group([self._table], self.dtype)] if self._table not in self._not_read() else []

    def _not_read(self) -> Collection[str]:
        """Return the names of weights around the layers that are in memory anyway, in another form perhaps."""
        return ()

    def _rest(self, window: int | None) -> list[TensorGroup]:
        """Return what is always in memory, without the positions behind a window; None for all positions."""
        shorter: dict[str, StoredTensor] = {}
        if window is not None and self.adapter is None and self.spec.positions:
            name = outside_name(self.family, "positions")
            shorter[name] = self._tensors[name].beginning(self.spec.first_position + window)
        return [self._group(names, dtype, shorter) for names, dtype in self._always]

    def _group(
        self, names: Iterable[str], dtype: torch.dtype | None = None, instead: Mapping[str, StoredTensor] = {}
    ) -> TensorGroup:
        """Return a group of tensors in a dtype; None for those that they are stored in, float32 for blocks."""
        tensors = {name: instead.get(name, self._tensors[name]) for name in names}
        dtypes = {name: dtype or DTYPES.get(tensor.kind, torch.float32) for name, tensor in tensors.items()}
        changes = {} if self.adapter is None else self.adapter.changes
        return TensorGroup(self._checkpoint, tensors, dtypes, changes)

    @property
    def _packing(self) -> Packing | None:
        """How layers are packed without a loss; None if no kernel computes them."""
        return self._as_stored or (Packing(self.dtype) if self._computed else None)

    @property
    def _computed(self) -> bool:
        """Whether kernels compute the layers."""
        return self.device.type == "cpu" and kernels().has(self.dtype) and not self._apart()

    @cached_property
    def _as_stored(self) -> Packing | None:
        """The packing that keeps blocks of few bits; None if there are none, or their entries are needed."""
        if not self._computed or self.adapter is not None or not is_gguf(self.directory):
            return None
        kinds = as_stored.kinds_of(self.family, self.spec, self._tensors)
        return Packing(self.dtype, kinds=kinds, rows=False) if any(kinds) else None

    def _packed(self, packing: Packing) -> PackedLayers:
        """Return the layers in packed form."""
        groups, identity = self._layers, ""
        if packing.quantized:
            kept = as_stored.as_bytes(self._tensors) if packing.kinds else {}
            groups = {number: self._group(names, None, kept) for number, names in enumerate(self._in_layers, 1)}
            identity = fingerprint(self.directory, self.adapter, self._cut)
        return PackedLayers(packing, self.family, self.spec, groups, identity, self._output_parts())

    def _rows(self, name: str, step: int = ROWS, *, in_blocks: bool = True) -> list[Rows]:
        """Return a matrix in parts of some rows each, see :func:`rows_of`."""
        whole = self._tensors[name]
        return rows_of(whole, lambda part: self._group([name], None, {name: part}), step, in_blocks=in_blocks)

    def _output_parts(self) -> Sequence[Rows]:
        """Return the output embedding in parts of some rows each, if it is quantised."""
        return ()

    def _load(
        self, plan: MemoryPlan | None, also: Sequence[TensorGroup] = (), packing: Packing | None = None
    ) -> Parts:
        """Read the resident weights, and make the readers of the others.

        Args:
            plan: What to keep in memory; None for everything.
            also: Further tensors of the head to read.
            packing: How the layers are packed; None for without a loss.

        Raises:
            ModelNotFoundError: The files cannot be read.
            FileError: The companion file is damaged, or belongs to other weights.
            StorageError: The companion file cannot be written.
        """
        packing = packing or self._packing
        if packing is None:
            return self._parts(plan, also, None, None)
        packed = self._packed(packing)
        # The companion file comes first, because writing it takes memory that the weights do not take yet.
        file = packed.open(needed=plan is not None and bool(plan.streamed))
        if file is None:
            return self._parts(plan, also, packed, None)
        with closed_on_error(file):
            return self._parts(plan, also, packed, file)

    def _parts(
        self,
        plan: MemoryPlan | None,
        also: Sequence[TensorGroup],
        packed: PackedLayers | None,
        file: PackedFile | None,
    ) -> Parts:
        family, spec, meter = self.family, self.spec, Meter()
        numbers = tuple(self._layers) if plan is None else plan.resident
        table_resident = plan is None or plan.table_resident
        staging = aligned_buffer(PIECE)
        rest = self._rest(None if plan is None else plan.sizes.window)
        named: dict[str, Tensor] = {}
        table = self._tensors[self._table]
        keeps = plan is None and self._as_stored is not None and bool(self._tables) and table.kind in EXACT
        with blaming_weights():
            for group in (*rest, *also, *(self._tables if table_resident and not keeps else ())):
                named |= self._read(group, staging)
        layers = dict(zip(numbers, self._resident(numbers, packed, file, staging), strict=True))
        if self.adapter is not None:
            named |= {name: w.to(self.device, self._head_dtype) for name, w in self.adapter.weights.items()}
        rows: RowCache | PackedTable | None = None
        if keeps:
            with blaming_weights():
                found = packed_rows(self._rows(self._table), spec.row, self.dtype, FORMATS[table.kind])
                rows = PackedTable(found, self.dtype)
        elif plan is not None and not table_resident:
            rows = RowCache(
                self._checkpoint,
                table,
                capacity=plan.embedding_rows,
                dtype=self.dtype,
                device=self.device,
                meter=meter,
            )
        groups = self._layers if file is None else file.groups
        streamed = {} if plan is None else {number: groups[number] for number in plan.streamed}
        streamer = Streamer(streamed, self.device, meter) if streamed else None
        lasting = isinstance(rows, RowCache) or (streamer is not None and file is None)
        if not lasting:
            self._checkpoint.close()
        return Parts(
            family=family,
            spec=spec,
            device=self.device,
            dtype=self.dtype,
            meter=meter,
            outside=outside_by_role(family, spec, named),
            head=self._head_by_role(named),
            layers=layers,
            streamer=streamer,
            rows=rows,
            packing=None if packed is None else packed.packing,
            packed=file,
            checkpoint=self._checkpoint if lasting else None,
        )

    def _resident(
        self, numbers: Sequence[int], packed: PackedLayers | None, file: PackedFile | None, staging: Tensor
    ) -> Iterator[Weights | PackedLayer]:
        """Yield the weights of layers. Packed ones are read to where they stay, in large pages, or packed now."""
        if packed is not None and file is not None:
            sizes = [file.groups[number].size for number in numbers]
            for number, buffer in zip(numbers, torch.split(aligned_buffer(sum(sizes)), sizes), strict=True):
                file.groups[number].read(buffer, staging)
                yield packed.packing.layer(self.spec.layers[number - 1], file.groups[number].views(buffer))
            return
        with blaming_weights():
            if packed is not None:
                size = sum(packed.sizes[number - 1] for number in numbers)
                yield from in_large_pages(packed.packed(numbers), size)
                return
            for number in numbers:
                stored = self._read(self._layers[number], staging)
                yield layer_by_role(self.family, self.spec.layers[number - 1], number, stored)

    def _head_by_role(self, named: Mapping[str, Tensor]) -> Weights:
        """Return the head's weights by role."""
        return head_by_role(self.family, self.spec, named)

    def _read(self, group: TensorGroup, staging: Tensor) -> dict[str, Tensor]:
        buffer = aligned_buffer(group.size)
        group.read(buffer, staging)
        return group.views(buffer.to(self.device))
