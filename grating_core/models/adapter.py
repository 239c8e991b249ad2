"""Adapters as PEFT saves them: low-rank changes of weights, and weights of their own."""

from __future__ import annotations

import copy
import hashlib
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from grating_core.errors import ModelNotFoundError, UnsupportedModelError
from grating_core.files.reading import check_regular, read_json
from grating_core.memory.header import FLOATS
from grating_core.models.directory import find_model
from grating_core.models.hub import Hub

_WEIGHTS = "adapter_model.safetensors"
_BEFORE = "base_model.model."
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_LARGEST = 65504.0  # change of a weight, which is float16's largest number: beyond it none is meant
_ROWS = 64  # of a weight that are changed at a time, so that its float32 copy stays small
_RANK = _ALPHA = 8  # PEFT's own, where a configuration says nothing
# What these say would change the arithmetic, or where it is applied.
_OTHER_KINDS = (
    "use_dora", "fan_in_fan_out", "alpha_pattern", "lora_bias", "use_qalora", "use_bdlora", "arrow_config",
    "alora_invocation_tokens", "monteclora_config", "kasa_config", "velora_config", "layer_replication",
    "target_parameters", "trainable_token_indices",
)  # fmt: skip
# These change the base weights as well when PEFT loads them.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LowRank:
    """A change of one weight is scale · B A (LoRA, arXiv 2106.09685).

    Attributes:
        down: A, float32 ``[r, in]``.
        up: B with the scale in it, float32 ``[out, r]``.
    """

    down: Tensor
    up: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Return the shape of the weight that it fits."""
        return self.up.shape[0], self.down.shape[1]

    def add_to(self, weight: Tensor) -> None:
        """Change a weight ``[out, in]`` of any dtype in place."""
        for start in range(0, len(weight), _ROWS):
            rows = slice(start, start + _ROWS)
            weight[rows] = weight[rows].float().addmm_(self.up[rows], self.down)


class Adapter:
    """This is a LoRA adapter, read into memory.

    Attributes:
        changes: Changes of weights, by the name of the weight.
        weights: Weights that replace the head's, if they were trained along; float32, by name.
        identity: A digest of every byte of its tensors, and of the scales that its configuration gives them.
            Adapters that change something else, or by another amount, have others.

    Args:
        directory: The directory of ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        ModelNotFoundError: The files are missing or damaged.
        UnsupportedModelError: The files are of another kind of adapter.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._settings = _read_settings(directory)
        stored = _read_tensors(directory / _WEIGHTS)
        self.changes: dict[str, LowRank] = {}
        self.weights: dict[str, Tensor] = {}
        digest = hashlib.sha256()
        for name, tensor in sorted(stored.items()):
            digest.update(f"{name} {list(tensor.shape)} ".encode() + tensor.contiguous().numpy().tobytes())
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
        """Return the bytes that it takes in memory."""
        tensors = [part for change in self.changes.values() for part in (change.down, change.up)]
        return sum(tensor.nbytes for tensor in (*tensors, *self.weights.values()))

    def check(self, shapes: Mapping[str, tuple[int, ...]], head: Collection[str], table: str = "") -> None:
        """Compare with the weights of a model.

        Args:
            shapes: Shapes of the model's weights, by name.
            head: Names of the weights that belong to the head.
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
        """Return the same adapter for a model that has only some rows of a weight.

        Args:
            name: Name of the whole weight.
            rows: Numbers of its rows, by the names that they have as weights ``[1, in]``.
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
    """Read the tensors of an adapter as float32, by the names that the base has for its modules."""
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


@dataclass(frozen=True)
class _Settings:
    """This is the configuration of a LoRA adapter, as far as it changes scores; names are those of PEFT.

    Attributes:
        rank_pattern: Other ranks than ``r``, by the ends of modules' names, as regular expressions.
        lora_alpha: The factor of changes, before they are divided by their rank.
        use_rslora: Whether they are divided by its root instead.
        modules_to_save: Names of modules that were trained whole.
        target_modules: Ends of the names of the modules that it changes, or one regular expression; None if that
            cannot be told.
    """

    r: int
    rank_pattern: Mapping[str, int]
    lora_alpha: float
    use_rslora: bool
    modules_to_save: tuple[str, ...]
    target_modules: tuple[str, ...] | str | None

    def rank(self, module: str) -> int:
        """Return the rank of the change of a module."""
        found = (rank for pattern, rank in self.rank_pattern.items() if re.match(rf"(.*\.)?({pattern})$", module))
        return next(found, self.r)

    def scale(self, module: str) -> float:
        """Return what the change of a module is multiplied by."""
        rank = self.rank(module)
        return self.lora_alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, weight: str) -> bool:
        """Tell whether the adapter is to have a change of a weight; ``False`` where that cannot be told."""
        module = weight.removesuffix(".weight")
        if self.target_modules is None or set(module.split(".")) & set(self.modules_to_save):
            return False
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, module) is not None
        return f".{module}".endswith(tuple(f".{end}" for end in self.target_modules))

    def has_saved(self, names: Iterable[str]) -> bool:
        """Tell whether a module that was trained whole is there; PEFT lists names of several kinds of heads."""
        parts = {part for name in names for part in name.split(".")}
        return not self.modules_to_save or bool(parts & {part.split(".")[-1] for part in self.modules_to_save})


def _read_settings(directory: Path) -> _Settings:
    path = directory / "adapter_config.json"
    try:
        fields: dict[str, Any] = read_json(path)
        kind = fields["peft_type"]
    except FileNotFoundError as error:
        raise ModelNotFoundError(
            f"adapter={str(directory)!r} is not an adapter's directory: it has no adapter_config.json"
        ) from error
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ModelNotFoundError(f"{path} cannot be read as an adapter's configuration: {error!r}") from error
    others = [name for name in _OTHER_KINDS if fields.get(name)]
    if str(fields.get("init_lora_weights")).lower().startswith(_CHANGES_BASE):
        others.append("init_lora_weights")
    if kind != "LORA" or others:
        raise UnsupportedModelError(
            f"{path} describes peft_type={kind!r} with {others}; plain LoRA is supported. Merge it into its base "
            f"with PEFT's merge_and_unload() and load the result"
        )
    try:
        return _checked(fields)
    except (ValueError, TypeError, re.error) as error:
        raise ModelNotFoundError(f"{path} is damaged: {error}") from error


def _checked(fields: Mapping[str, Any]) -> _Settings:
    def get(name: str, usual: Any) -> Any:
        found = fields.get(name)
        return usual if found is None else found

    ranks = get("rank_pattern", {})
    if not isinstance(ranks, dict):
        raise TypeError(f"rank_pattern={ranks!r} has no ranks by name")
    for name, rank in (("r", get("r", _RANK)), *ranks.items()):
        if type(rank) is not int or rank < 1:
            raise ValueError(f"the rank {name}={rank!r} is not a whole number of at least 1")
        re.compile(name)
    alpha = get("lora_alpha", _ALPHA)
    if type(alpha) not in (int, float) or not math.isfinite(alpha) or alpha == 0:
        raise ValueError(f"lora_alpha={alpha!r} is not a finite number other than 0")
    rooted = get("use_rslora", False)
    if not isinstance(rooted, bool):
        raise TypeError(f"use_rslora={rooted!r} is neither true nor false")
    saved = get("modules_to_save", [])
    targets = get("target_modules", None)
    for name, names in (("modules_to_save", saved), ("target_modules", targets or [])):
        if isinstance(names, list) and all(isinstance(module, str) for module in names):
            continue
        if name == "modules_to_save" or not isinstance(names, str):
            raise TypeError(f"{name}={names!r} is no list of names")
    # With these PEFT leaves out modules that the targets name.
    if any(fields.get(name) not in (None, []) for name in ("exclude_modules", "layers_to_transform")):
        targets = None
    if isinstance(targets, str):
        re.compile(targets)
    return _Settings(
        r=get("r", _RANK),
        rank_pattern=ranks,
        lora_alpha=alpha,
        use_rslora=rooted,
        modules_to_save=tuple(saved),
        target_modules=tuple(targets) if isinstance(targets, list) else targets,
    )


def find_adapter(name: str, *, hub: Hub | None = None, show_progress: bool = False) -> Adapter:
    """Find the adapter of that name, a directory or a hub id, and read it.

    Args:
        name: The name.
        hub: The way in which the hub is asked for the base model. The adapter is another, of which the newest is
            taken.
        show_progress: Whether to show progress bars while files are fetched.

    Raises:
        ModelNotFoundError: There is no such adapter, or it is damaged.
        UnsupportedModelError: The files are of another kind of adapter.
    """
    try:
        directory = find_model(name, hub=hub and hub.newest, show_progress=show_progress)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(f"adapter={name!r} was not found. {error}") from error
    return Adapter(directory)
