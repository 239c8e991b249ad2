"""The companion file of a model with packed layers: each layer lies in it in one piece, which is read at once."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from grating_core.errors import FileError, StorageError
from grating_core.files.places import is_there
from grating_core.layers.packed import Layout
from grating_core.lifetime import closed_on_error
from grating_core.memory.checkpoint import Checkpoint, whole_sectors
from grating_core.memory.companion import WAY_OUT, Contents, check_companion, write_companion
from grating_core.memory.group import TensorGroup
from grating_core.memory.header import KIND_OF

_CHECKS = "checks"


def layer_bytes(layout: Layout) -> int:
    """Return the bytes that a packed layer has in the file, which are whole sectors."""
    return whole_sectors(_used(layout))


def _used(layout: Layout) -> int:
    return sum(dtype.itemsize * prod(shape) for dtype, shape in layout.values())


class PackedFile:
    """This class reads the packed layers of a model from its companion file.

    Args:
        path: The file.
        layouts: The layout of each layer.
        fingerprint: Identity of the model's weights.

    Raises:
        FileError: The file is damaged, or belongs to other weights.
    """

    def __init__(self, path: Path, layouts: Sequence[Layout], fingerprint: str) -> None:
        self.groups: dict[int, TensorGroup] = {}
        """The tensors of each layer, by number from 1."""
        try:
            self._checkpoint = Checkpoint([path], lasting=True)
            with closed_on_error(self._checkpoint):
                check_companion(path, self._checkpoint, _contents(layouts), fingerprint)
                stored = self._checkpoint.tensors[_CHECKS]
                checks = torch.empty(stored.end - stored.start, dtype=torch.uint8)
                self._checkpoint.read(stored, stored.start, checks)
                for number, (layout, check) in enumerate(zip(layouts, checks.numpy().view("<u4"), strict=True), 1):
                    self.groups[number] = _CheckedGroup(self._checkpoint, number, layout, int(check))
        except (FileError, KeyError, ValueError, OSError) as error:
            raise FileError(f"{path} is no companion file of this model ({error}); {WAY_OUT}") from error

    def close(self) -> None:
        """Close the file."""
        self._checkpoint.close()


class _CheckedGroup(TensorGroup):
    """This group compares a layer with its checksum when the layer is first read; the checkpoint does so later."""

    def __init__(self, checkpoint: Checkpoint, number: int, layout: Layout, check: int) -> None:
        tensors = {name: checkpoint.tensors[f"{number}.{name}"] for name in layout}
        super().__init__(checkpoint, tensors, {name: dtype for name, (dtype, _) in layout.items()})
        self._name = f"{tensors[next(iter(layout))].path}: layer {number}"
        self._check: int | None = check

    def read(self, buffer: Tensor, staging: Tensor) -> None:
        """See :meth:`TensorGroup.read`; raises ``FileError`` for a damaged layer."""
        super().read(buffer, staging)
        if self._check is None:
            return
        if zlib.crc32(buffer[: self.size].numpy().data) != self._check:
            raise FileError(f"{self._name} is damaged; {WAY_OUT}")
        self._check = None


def open_packed(
    path: Path,
    layouts: Sequence[Layout],
    fingerprint: str,
    layers: Callable[[], Iterable[Mapping[str, Tensor]]],
    *,
    show_progress: bool = False,
) -> PackedFile:
    """Open the companion file of a model, after writing it if there is none.

    Args:
        path: The file.
        layouts: The layout of each layer.
        fingerprint: Identity of the model's weights.
        layers: Function that yields the tensors of one packed layer after the other, by name.
        show_progress: Whether to show a progress bar while writing.

    Raises:
        FileError: The file is damaged, or belongs to other weights.
        StorageError: The file cannot be written.
    """
    if not is_there(path):
        parts = _parts(layers, layouts, show_progress=show_progress)
        try:
            write_companion(path, _contents(layouts), fingerprint, parts)
        except StorageError as error:
            raise StorageError(
                f"the companion file with quantised layers is missing, and {error}; or take another dtype, or "
                f"leave bits or memory_budget out"
            ) from error
    return PackedFile(path, layouts, fingerprint)


def _contents(layouts: Sequence[Layout]) -> Contents:
    """Return what the file has: the tensors of each layer with fill up to a whole sector, and then checksums."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for number, layout in enumerate(layouts, 1):
        for name, (dtype, shape) in layout.items():
            found[f"{number}.{name}"] = KIND_OF[dtype], shape
        found[f"{number}.fill"] = "U8", (layer_bytes(layout) - _used(layout),)
    return {**found, _CHECKS: ("U32", (len(layouts),))}


def _parts(
    layers: Callable[[], Iterable[Mapping[str, Tensor]]], layouts: Sequence[Layout], *, show_progress: bool
) -> Iterator[memoryview]:
    """Yield the bytes of all layers, and then their checksums."""
    checks, packed = [], iter(layers())
    for layout in tqdm(layouts, "Writing layers", unit="layer", disable=not show_progress):
        check = 0
        # No name here stands for the layer, which would stay in memory while the next one is packed.
        for data in _bytes(next(packed), layout):
            check = zlib.crc32(data, check)
            yield data
        checks.append(check)
    yield np.array(checks, dtype="<u4").data


def _bytes(tensors: Mapping[str, Tensor], layout: Layout) -> Iterator[memoryview]:
    """Yield the bytes of a layer's tensors, and fill."""
    fill = torch.zeros(layer_bytes(layout) - _used(layout), dtype=torch.uint8)
    for tensor in (*(tensors[name] for name in layout), fill):
        yield tensor.view(-1).view(torch.uint8).numpy().data
