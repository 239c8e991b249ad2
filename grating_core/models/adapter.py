"""Adapters as PEFT saves them: low-rank changes of weights, and weights of their own."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from grating_core.errors import ModelNotFoundError, UnsupportedModelError
from grating_core.files.reading import check_regular
from grating_core.memory.header import FLOATS
from grating_core.models.adapter_settings import read_adapter_settings
from grating_core.models.directory import find_model
from grating_core.models.hub import Hub

_WEIGHTS = "adapter_model.safetensors"
_BEFORE = "base_model.model."
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_LARGEST = 65504.0  # change of a weight, which is float16's largest number: beyond it none is meant
_ROWS = 64  # of a weight that are changed at a time, so that its float32 copy stays small


@dataclass(frozen=True)
class LowRank:
    """A change of one weight, scale · B A (LoRA, arXiv 2106.09685).

    Attributes:
        down: A, float32 ``[r, in]``.
        up: B with the scale in it, float32 ``[out, r]``.
    """

    down: Tensor
    up: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight that it fits."""
        return self.up.shape[0], self.down.shape[1]

    def add_to(self, weight: Tensor) -> None:
        """Change a weight ``[out, in]`` of any dtype in place."""
        for start in range(0, len(weight), _ROWS):
            rows = slice(start, start + _ROWS)
            weight[rows] = weight[rows].float().addmm_(self.up[rows], self.down)


class Adapter:
    """A LoRA adapter, read into memory.

    Attributes:
        changes: What is added, by the name of the weight.
        weights: What replaces the head's weights, if they were trained along; float32, by name.
        identity: Tells what it changes, and by how much, from the changes of other adapters: a digest of every
            byte of its tensors, and of the scales that its configuration gives them.

    Args:
        directory: Has ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        ModelNotFoundError: The files are missing or damaged.
        UnsupportedModelError: It is another kind of adapter.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._settings = read_adapter_settings(directory)
        stored = _read_tensors(directory / _WEIGHTS)
        self.changes: dict[str, LowRank] = {}
        self.weights: dict[str, Tensor] = {}
        digest = hashlib.sha256()
        for name, tensor in sorted(stored.items()):
            digest.update(f"{name} {list(tensor.shape)} ".encode() + _bytes(tensor))
            if name.endswith(_DOWN):
                module = name.removesuffix(_DOWN)
                scale = self._settings.scale(module)
                digest.update(f"{scale!r} ".encode())
                self.changes[f"{module}.weight"] = self._change(module, tensor, stored, scale)
            elif name.endswith(_UP):
                if name.removesuffix(_UP) + _DOWN not in stored:
                    raise self._damaged(f"has {name}, and no lora_A beside it")
            elif ".lora_" in name or not name.endswith((".weight", ".bias")):
                raise UnsupportedModelError(f"{self._path} has {name}, which is no change of a layer's weight")
            else:
                self.weights[name] = tensor
        self.identity = digest.hexdigest()
        if not stored:
            raise self._damaged("has no tensors, so it would change nothing")
        if not self._settings.has_saved(self.weights):
            trained = list(self._settings.modules_to_save)
            raise self._damaged(f"has no weight of modules_to_save={trained}, which were trained along")
        # PEFT keeps a copy of the base's weight where the output embedding is adapted.
        for name in self.weights.keys() & self.changes.keys():
            self.changes.pop(name).add_to(self.weights[name])

    @property
    def _path(self) -> Path:
        return self.directory / _WEIGHTS

    def _damaged(self, what: str) -> ModelNotFoundError:
        return ModelNotFoundError(f"{self._path} is damaged: it {what}")

    def _change(self, module: str, down: Tensor, stored: Mapping[str, Tensor], scale: float) -> LowRank:
        if (up := stored.get(module + _UP)) is None:
            raise self._damaged(f"has {module}{_DOWN}, and no lora_B beside it")
        rank = self._settings.rank(module)
        if down.dim() != 2 or up.dim() != 2 or not len(down) == up.shape[1] == rank:
            raise self._damaged(
                f"has {module}{_DOWN} of shape {list(down.shape)} and lora_B of shape {list(up.shape)}, and "
                f"adapter_config.json says that their rank is {rank}"
            )
        up = up * scale
        largest = float(up.norm(dim=1).max() * down.norm(dim=0).max()) if up.numel() and down.numel() else math.nan
        if not largest <= _LARGEST:
            raise self._damaged(f"would change {module}.weight by as much as {largest:.3g}")
        return LowRank(down, up)

    @property
    def size(self) -> int:
        """Bytes in memory."""
        tensors = [part for change in self.changes.values() for part in (change.down, change.up)]
        return sum(tensor.nbytes for tensor in (*tensors, *self.weights.values()))

    def check(self, shapes: Mapping[str, tuple[int, ...]], head: Collection[str], table: str = "") -> None:
        """Compare with the weights of a model.

        Args:
            shapes: Of its weights, by name.
            head: Names of those that belong to the head.
            table: Name of the embedding table, if rows of it are read by themselves: it cannot be changed then.

        Raises:
            ModelNotFoundError: The adapter lacks changes of weights that its configuration says it changes.
            UnsupportedModelError: The adapter was made for another model, or replaces more than the head.
        """
        if others := (self.weights.keys() & shapes.keys() - set(head)) | ({table} & self.changes.keys()):
            raise UnsupportedModelError(
                f"the adapter in {self.directory} replaces {', '.join(sorted(others))}; of weights that were "
                f"trained whole, only those of the head are supported. Merge it into its base with PEFT's "
                f"merge_and_unload()"
            )
        wanted: dict[str, tuple[int, ...]] = {name: change.shape for name, change in self.changes.items()}
        wanted |= {name: tuple(weight.shape) for name, weight in self.weights.items()}
        for name, shape in wanted.items():
            if shapes.get(name) != shape:
                there = f"is {list(shapes[name])} in this model" if name in shapes else "is not in this model"
                raise UnsupportedModelError(
                    f"the adapter in {self.directory} was made for another model: it changes {name} of shape "
                    f"{list(shape)}, which {there}; use the base model that its adapter_config.json names"
                )
        matrices = (name for name, shape in shapes.items() if name.endswith(".weight") and len(shape) == 2)
        if missing := [name for name in matrices if name not in wanted and self._settings.targets(name)]:
            raise self._damaged(
                f"lacks changes of {len(missing)} weights that adapter_config.json has in target_modules: "
                f"{', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}"
            )

    def pick_rows(self, name: str, rows: Mapping[str, int]) -> Adapter:
        """The same adapter for a model that has only some rows of a weight.

        Args:
            name: Of the whole weight.
            rows: The numbers of its rows, by the names that they have as weights ``[1, in]``.
        """
        picked = copy.copy(self)
        picked.changes, picked.weights = dict(self.changes), dict(self.weights)
        change, weight = picked.changes.pop(name, None), picked.weights.pop(name, None)
        for row, number in rows.items():
            if change is not None:
                picked.changes[row] = LowRank(change.down, change.up[number : number + 1].clone())
            if weight is not None:
                picked.weights[row] = weight[number : number + 1].clone()
        return picked


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of an adapter as float32, by the names that the base has for its modules."""
    try:
        check_regular(path)
        stored = load_file(path)
    except Exception as error:  # safetensors raises an error of its own that is no OSError
        raise ModelNotFoundError(f"{path} cannot be read: {error}") from error
    found: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        own = name.removeprefix(_BEFORE)
        for wrapper in (".modules_to_save.", ".base_layer."):
            own = own.replace(wrapper, ".")
        if own in found:
            raise ModelNotFoundError(f"{path} is damaged: it has {own} twice")
        if tensor.dtype not in FLOATS.values():
            raise UnsupportedModelError(
                f"{path} stores {name} as {str(tensor.dtype).removeprefix('torch.')}: quantised weights mean "
                f"nothing without their scales and are not supported; save the adapter in float32, float16 or "
                f"bfloat16"
            )
        found[own] = tensor.float()
        if not found[own].isfinite().all():
            raise ModelNotFoundError(f"{path} is damaged: {name} has numbers that are not finite")
    return found


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


def find_adapter(name: str, *, hub: Hub | None = None, show_progress: bool = False) -> Adapter:
    """The adapter of that name: a directory, or a hub id.

    Args:
        name: The name.
        hub: How the hub is asked for the base model. The adapter is another, of which the newest is taken.
        show_progress: Show progress bars while fetching.

    Raises:
        ModelNotFoundError: There is none, or it is damaged.
        UnsupportedModelError: It is another kind of adapter.
    """
    try:
        directory = find_model(name, hub=hub and hub.newest, show_progress=show_progress)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(f"adapter={name!r} was not found. {error}") from error
    return Adapter(directory)
