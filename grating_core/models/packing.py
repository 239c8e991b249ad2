"""Packed layers of a model: their dtypes, what they take in memory, and where they come from."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from grating_core.errors import StorageError
from grating_core.files.places import cache_directory, is_kept, is_there
from grating_core.files.writing import require_room
from grating_core.kernels.packing import PACKING
from grating_core.layers.linear import Weights
from grating_core.layers.packed import Layout, PackedLayer, layer_of, layout_of, packed_layer
from grating_core.layers.spec import LayerSpec, Role
from grating_core.memory.checkpoint import aligned_buffer
from grating_core.memory.group import PIECE, TensorGroup
from grating_core.memory.meter import return_freed_memory
from grating_core.models.family import Family, ModelSpec
from grating_core.models.layout import layer_by_role, layer_names
from grating_core.models.packed_file import PackedFile, layer_bytes, open_packed

QUANTIZED: frozenset[Role] = frozenset(
    ("query", "key", "value", "output", "gate", "up", "down", "position_key", "position_query")
)
"""The roles of the products of a layer in 8 bits."""


@dataclass(frozen=True)
class Packing:
    """A packing says in what a layer computes.

    Attributes:
        states: The dtype of hidden states, and of products that are not in 8 bits: bfloat16 or float32.
        quantized: The roles of the products in 8 bits; none by default, which loses nothing.
    """

    states: torch.dtype
    quantized: frozenset[Role] = frozenset()

    def packed(self, spec: LayerSpec, weights: Weights, *, in_place: bool = False) -> PackedLayer:
        """Pack the weights of a layer, which are given by role in any floating dtype.

        All are copied, unless packing may use their memory, ``in_place``.
        """
        return packed_layer(spec, weights, self.states, self.quantized, in_place=in_place)

    def layer(self, spec: LayerSpec, tensors: Mapping[str, Tensor]) -> PackedLayer:
        """Return the packed layer that has these tensors, see :func:`grating_core.layers.packed.tensors_of`."""
        return layer_of(spec, tensors, self.states, self.quantized)

    def layout(self, family: Family, spec: LayerSpec) -> Layout:
        """Return the layout of a layer in this packing."""
        stored = {name: torch.empty(shape, device="meta") for name, shape in layer_names(family, spec, 1).items()}
        return layout_of(spec, layer_by_role(family, spec, 1, stored), self.states, self.quantized)


class PackedLayers:
    """Packed layers come from the weights on disk, or from the companion file that holds them packed.

    Args:
        packing: How the layers are packed.
        family: The description of the model's family.
        spec: The description of the model.
        groups: The weights of each layer on disk, in the dtypes that they are stored in, by number from 1.
        fingerprint: Identity of the model's weights.
    """

    def __init__(
        self,
        packing: Packing,
        family: Family,
        spec: ModelSpec,
        groups: Mapping[int, TensorGroup],
        fingerprint: str,
    ) -> None:
        self.packing = packing
        self._family = family
        self._spec = spec
        self._groups = groups
        self._fingerprint = fingerprint
        self._layouts = [packing.layout(family, layer) for layer in spec.layers]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The bytes of each packed layer."""
        return tuple(map(layer_bytes, self._layouts))

    @property
    def writing(self) -> int:
        """The bytes that writing the companion file takes in memory."""
        stored = max(group.size for group in self._groups.values())
        return stored + max(self.sizes) + PIECE + PACKING

    def require_file(self) -> None:
        """Try, before anything is computed, whether the companion file is there or can be written.

        Raises:
            StorageError: The file is missing and cannot be written.
        """
        if not is_there(path := self._path()):
            require_room(path, sum(self.sizes))

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
        numbers = range(1, len(self._layouts) + 1)
        return open_packed(
            path, self._layouts, self._fingerprint, lambda: self.packed(numbers), show_progress=show_progress
        )

    def _path(self) -> Path:
        """Return the companion file. Raises ``StorageError`` if there is no place for it."""
        return cache_directory() / "layers" / f"{self._fingerprint[:16]}-int8.safetensors"

    def packed(self, numbers: Collection[int]) -> Iterator[PackedLayer]:
        """Yield layers that are packed now. One layer at a time is in memory as it is on disk.

        Raises:
            FileError: The weights cannot be read.
        """
        staging = aligned_buffer(PIECE)
        buffer = aligned_buffer(max((self._groups[number].size for number in numbers), default=0))
        for number in numbers:
            group, spec = self._groups[number], self._spec.layers[number - 1]
            group.read(buffer, staging)
            weights = layer_by_role(self._family, spec, number, group.views(buffer))
            yield self.packing.packed(spec, weights)
            # Copies that packing made lie between packed layers on the heap, and would double what these take.
            return_freed_memory()
