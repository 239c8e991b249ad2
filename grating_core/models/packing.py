"""Packed layers of a model: their formats, what they take in memory, and where they come from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from grating_core.errors import StorageError
from grating_core.files.places import cache_directory, is_kept, is_there
from grating_core.files.writing import require_room
from grating_core.kernels.operands import Weight
from grating_core.kernels.packing import PACKING
from grating_core.layers.linear import Weights
from grating_core.layers.packed import (
    INT8,
    Q4,
    Format,
    Formats,
    Layout,
    PackedLayer,
    fields_of,
    layer_of,
    layout_of,
    layout_of_weight,
    packed_layer,
    tensors_of,
    weight_of,
)
from grating_core.layers.spec import LayerSpec, Role
from grating_core.memory.checkpoint import aligned_buffer
from grating_core.memory.group import PIECE, TensorGroup
from grating_core.memory.meter import return_freed_memory
from grating_core.models.as_stored import FORMATS, Rows, packed_blocks, packed_rows
from grating_core.models.family import Family, ModelSpec
from grating_core.models.layout import layer_by_role, layer_names
from grating_core.models.packed_file import PackedFile, layer_bytes, open_packed

IN_8_BITS: Formats = dict.fromkeys(
    ("query", "key", "value", "output", "gate", "up", "down", "position_key", "position_query"), INT8
)
"""The formats of a layer in 8 bits."""


@dataclass(frozen=True)
class Packing:
    """A packing says in what a layer computes.

    Attributes:
        states: The dtype of hidden states, and of products that are not quantised: bfloat16 or float32.
        formats: The formats of the quantised products by role; none by default, which loses nothing.
        output: The format of a language model's output embedding; None if it is not quantised.
        apart: The roles of products that are computed elsewhere, such as those of pruned MLPs.
        rows: Whether products by int8 matrices take int8 rows; if not, only weights are quantised, and no states.
        kinds: The types of blocks that products of each layer are stored in and keep, by role; none by default.
        weighed: Whether errors of the rounded weights count by the inputs that a sample of tokens gives them.
    """

    states: torch.dtype
    formats: Formats = field(default_factory=dict)
    output: Format | None = None
    apart: frozenset[Role] = frozenset()
    rows: bool = True
    kinds: tuple[Mapping[Role, str], ...] = ()
    weighed: bool = False

    @property
    def name(self) -> str:
        """The name of the formats, for companion files."""
        if self.kinds:
            return f"as-stored-{str(self.states).removeprefix('torch.')}" + "-output" * (self.output is not None)
        names = sorted({str(format) for format in self.formats.values()})
        output = [] if self.output is None else [f"output-{self.output}"]
        weighed = ["weighed"] if self.weighed else []
        return "-".join([*names, *weighed, *output, *(f"without-{role}" for role in sorted(self.apart))])

    @property
    def quantized(self) -> bool:
        """Whether products of layers are quantised."""
        return bool(self.formats or self.kinds)

    def packed(
        self,
        spec: LayerSpec,
        weights: Weights,
        number: int = 0,
        importance: Mapping[Role, Tensor] | None = None,
        *,
        in_place: bool = False,
    ) -> PackedLayer:
        """Pack the weights of a layer.

        All are copied, unless packing may use their memory, ``in_place``.

        Args:
            spec: The layer's spec.
            weights: The weights by role, in any floating dtype; those that keep their blocks as they are stored.
            number: The layer's number, from 1, if any keep their blocks.
            importance: See :func:`packed_layer`.
            in_place: Whether packing may use the weights' memory.
        """
        done = {
            role: packed_blocks(kind, weights[f"{role}.weight"], spec.shape(role)[1], weights.get(f"{role}.bias"))
            for role, kind in (self.kinds[number - 1].items() if self.kinds else ())
        }
        packed = packed_layer(spec, weights, self.states, self.formats, done, importance, in_place=in_place)
        return packed._replace(rows=self.rows)

    def layer(self, spec: LayerSpec, tensors: Mapping[str, Tensor]) -> PackedLayer:
        """Return the packed layer that has these tensors, see :func:`grating_core.layers.packed.tensors_of`."""
        return layer_of(spec, tensors, self.states)._replace(rows=self.rows)

    def layout(self, family: Family, spec: LayerSpec, number: int = 0) -> Layout:
        """Return the layout of a layer in this packing; see :meth:`packed` for its number."""
        kinds = self.kinds[number - 1] if self.kinds else {}
        formats = {**self.formats, **{role: FORMATS[kind] for role, kind in kinds.items()}}
        stored = {name: torch.empty(shape, device="meta") for name, shape in layer_names(family, spec, 1).items()}
        weights = layer_by_role(family, spec, 1, stored)
        there = {name: weight for name, weight in weights.items() if name.partition(".")[0] not in self.apart}
        return layout_of(spec, there, self.states, formats)


def generating(bits: int, states: torch.dtype) -> Packing:
    """Return the packing of a language model in so many bits."""
    formats = IN_8_BITS if bits == 8 else dict.fromkeys(IN_8_BITS, Q4)
    return Packing(states, formats, INT8, rows=False, weighed=bits == 4)


class PackedLayers:
    """Packed layers come from the weights on disk, or from the companion file that holds them packed.

    A language model's quantised output embedding is among them, as what comes behind the last layer.

    Args:
        packing: How the layers are packed.
        family: The description of the model's family.
        spec: The description of the model.
        groups: The weights of each layer on disk, in the dtypes that they are stored in, by number from 1.
        fingerprint: Identity of the model's weights.
        output: The output embedding on disk, in parts of some rows each; none if it is not quantised.
    """

    def __init__(
        self,
        packing: Packing,
        family: Family,
        spec: ModelSpec,
        groups: Mapping[int, TensorGroup],
        fingerprint: str,
        output: Sequence[Rows] = (),
    ) -> None:
        self.packing = packing
        self._family = family
        self._spec = spec
        self._groups = groups
        self._fingerprint = fingerprint
        self._output = output
        self.importances: Callable[[], Sequence[Mapping[Role, Tensor]]] | None = None
        """What finds the importances of each layer's inputs, which a packing with weighed errors needs."""
        self._layouts = [packing.layout(family, layer, number) for number, layer in enumerate(spec.layers, 1)]
        if packing.output is not None:
            self._layouts.append(layout_of_weight(spec.vocabulary, spec.width, packing.states, packing.output))

    @property
    def sizes(self) -> tuple[int, ...]:
        """The bytes of each packed layer."""
        return tuple(map(layer_bytes, self._layouts[: self._spec.depth]))

    @property
    def output_size(self) -> int:
        """The bytes of the quantised output embedding; 0 if it is not quantised."""
        return sum(map(layer_bytes, self._layouts[self._spec.depth :]))

    @property
    def writing(self) -> int:
        """The bytes that writing the companion file takes in memory."""
        stored = max(group.size for group in self._groups.values())
        part = max((rows.group.size for rows in self._output), default=0)
        return max(stored + max(self.sizes), part + self.output_size) + PIECE + PACKING

    def require_file(self) -> None:
        """Try, before anything is computed, whether the companion file is there or can be written.

        Raises:
            StorageError: The file is missing and cannot be written.
        """
        if not is_there(path := self._path()):
            require_room(path, sum(map(layer_bytes, self._layouts)))

    def open(self, *, needed: bool, show_progress: bool = False) -> PackedFile | None:
        """Open the companion file. If there is none, write it if it is needed, and else return None.

        Layers that are packed without a loss have no such file.

        Raises:
            FileError: The file is damaged, or belongs to other weights.
            StorageError: The file cannot be written.
        """
        if not self.packing.quantized:
            return None
        try:
            path = self._path()
        except StorageError:
            if needed:
                raise
            return None
        if not needed and not is_kept(path):
            return None
        return open_packed(path, self._layouts, self._fingerprint, self._tensors, show_progress=show_progress)

    def _path(self) -> Path:
        """Return the companion file. Raises ``StorageError`` if there is no place for it."""
        return cache_directory() / "layers" / f"{self._fingerprint[:16]}-{self.packing.name}.safetensors"

    def _tensors(self) -> Iterator[dict[str, Tensor]]:
        """Yield what the companion file holds."""
        # No name here stands for a layer, which would stay in memory while the next one is packed.
        yield from map(tensors_of, self.packed(range(1, self._spec.depth + 1)))
        if self.packing.output is not None:
            yield fields_of(self.output())

    def packed(self, numbers: Collection[int]) -> Iterator[PackedLayer]:
        """Yield layers that are packed now. One layer at a time is in memory as it is on disk.

        Raises:
            FileError: The weights cannot be read.
        """
        # A sample of tokens goes through all layers before memory is taken here.
        known = self.importances() if self.importances is not None and self.packing.weighed else None
        staging = aligned_buffer(PIECE)
        buffer = aligned_buffer(max((self._groups[number].size for number in numbers), default=0))
        for number in numbers:
            group, spec = self._groups[number], self._spec.layers[number - 1]
            group.read(buffer, staging)
            weights = layer_by_role(self._family, spec, number, group.views(buffer))
            yield self.packing.packed(spec, weights, number, None if known is None else known[number - 1])
            # Copies that packing made lie between packed layers on the heap, and would double what these take.
            return_freed_memory()

    def output(self) -> Weight:
        """Return the output embedding, which is quantised now. Some rows at a time are in memory as on disk.

        Raises:
            FileError: The weights cannot be read.
        """
        assert self.packing.output is not None
        return packed_rows(self._output, self._spec.width, self.packing.states, self.packing.output)

    def output_of(self, fields: Mapping[str, Tensor]) -> Weight:
        """Return the output embedding that has these tensors."""
        return weight_of(fields, self.packing.states, self._spec.vocabulary, self._spec.width)
