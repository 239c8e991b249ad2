"""An adapter, as PEFT saves it, holds low-rank changes of weights, and weights that replace others."""

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
_LARGEST = 65504.0  # the largest change of a weight, which is float16's largest number; more is damage
_ROWS = 64  # rows of a weight that are changed at a time, so that their float32 copy stays small
_RANK = _ALPHA = 8  # PEFT's defaults, for a configuration that says nothing
# These fields change the arithmetic of an adapter, or the place where it is applied.
_OTHER_KINDS = (
    "use_dora", "fan_in_fan_out", "alpha_pattern", "lora_bias", "use_qalora", "use_bdlora", "arrow_config",
    "alora_invocation_tokens", "monteclora_config", "kasa_config", "velora_config", "layer_replication",
    "target_parameters", "trainable_token_indices",
)  # fmt: skip
# These change the base weights as well when PEFT loads them.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LowRank:
    """A low-rank change adds scale · B A to one weight (LoRA, arXiv 2106.09685).

    Attributes:
        down: A, float32 ``[r, in]``.
        up: B times the scale, float32 ``[out, r]``.
    """

    down: Tensor
    up: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight that this change fits."""
        return self.up.shape[0], self.down.shape[1]

    def add_to(self, weight: Tensor) -> None:
        """Add the change to a weight ``[out, in]`` of any dtype, in place."""
        for start in range(0, len(weight), _ROWS):
            rows = slice(start, start + _ROWS)
            weight[rows] = weight[rows].float().addmm_(self.up[rows], self.down)


class Adapter:
    """This class holds a LoRA adapter in memory.

    Attributes:
        changes: Changes of weights, by the name of the weight.
        weights: Weights that replace the head's, if they were trained too; float32, by name.
        identity: A digest of every byte of the tensors, and of the scales that the configuration gives them.
            Adapters that change anything else, or by another amount, have other digests.

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
                raise UnsupportedModelError(f"{self._path} has {name}, which does not change a layer's weight")
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
        """The bytes of the adapter in memory."""
        tensors = [part for change in self.changes.values() for part in (change.down, change.up)]
        return sum(tensor.nbytes for tensor in (*tensors, *self.weights.values()))

    def check(self, shapes: Mapping[str, tuple[int, ...]], head: Collection[str], table: str = "") -> None:
        """Compare the adapter with the weights of a model.

        Args:
            shapes: Shapes of the model's weights, by name.
            head: Names of the weights that belong to the head.
            table: Name of the embedding table, if its rows are read one by one, so that no change can be added.

        Raises:
            ModelNotFoundError: The adapter lacks changes of weights that its configuration names.
            UnsupportedModelError: The adapter was made for another model, or replaces more than the head.
        """
        if others := (self.weights.keys() & shapes.keys() - set(head)) | ({table} & self.changes.keys()):
            raise UnsupportedModelError(
                f"the adapter in {self.directory} replaces {', '.join(sorted(others))}; an adapter may replace "
                f"only weights of the head. Merge the adapter into its base model with PEFT's merge_and_unload()"
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
            rows: Numbers of the rows, by the names of the weights ``[1, in]`` that they become.
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
    """Read the tensors of an adapter as float32, by the names of the base model's modules."""
    try:
        check_regular(path)
        stored = load_file(path)
    except Exception as error:  # the error of safetensors is no OSError
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
                f"{path} stores {name} as {str(tensor.dtype).removeprefix('torch.')}: quantised weights are not "
                f"supported; save the adapter in float32, float16 or bfloat16"
            )
        found[own] = tensor.float()
        if not found[own].isfinite().all():
            raise ModelNotFoundError(f"{path} is damaged: {name} has numbers that are not finite")
    return found


@dataclass(frozen=True)
class _Settings:
    """This class holds the settings of a LoRA adapter that change scores. The names are those of PEFT.

    Attributes:
        rank_pattern: Other ranks than ``r``, by regular expressions that match the ends of modules' names.
        lora_alpha: The factor of changes, before they are divided by their rank.
        use_rslora: Whether changes are divided by the square root of their rank instead.
        modules_to_save: Names of modules that were trained whole.
        target_modules: Ends of the names of the modules that the adapter changes, or one regular expression; None
            if the configuration does not tell.
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
        """Return the factor of the change of a module."""
        rank = self.rank(module)
        return self.lora_alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, weight: str) -> bool:
        """Tell whether the configuration names a weight; ``False`` if it does not tell."""
        module = weight.removesuffix(".weight")
        if self.target_modules is None or set(module.split(".")) & set(self.modules_to_save):
            return False
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, module) is not None
        return f".{module}".endswith(tuple(f".{end}" for end in self.target_modules))

    def has_saved(self, names: Iterable[str]) -> bool:
        """Tell whether one of the modules that were trained whole is there: PEFT lists several names of a head."""
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
            f"{path} describes peft_type={kind!r} with {others}; only plain LoRA is supported. Merge the adapter "
            f"into its base model with PEFT's merge_and_unload() and load the result"
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
        raise TypeError(f"rank_pattern={ranks!r} is not a table of ranks by name")
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
            raise TypeError(f"{name}={names!r} is not a list of names")
    # These two fields make PEFT leave out modules that the targets name.
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
    """Find an adapter and read it.

    Args:
        name: A directory or a hub id.
        hub: How the hub is asked for the base model; None asks as the user who is logged in. The revision is the
            base model's, so it is ignored and the newest adapter is taken.
        show_progress: Whether to show progress bars while files are fetched.

    Raises:
        ModelNotFoundError: There is no such adapter, or it is damaged.
        UnsupportedModelError: The adapter is of another kind than LoRA.
    """
    try:
        directory = find_model(name, hub=hub and hub.newest, show_progress=show_progress)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(f"adapter={name!r} was not found. {error}") from error
    return Adapter(directory)
