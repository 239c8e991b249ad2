"""What ``adapter_config.json`` says of a LoRA adapter."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grating_core.errors import ModelNotFoundError, UnsupportedModelError
from grating_core.files.reading import read_json

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
class AdapterSettings:
    """The configuration of a LoRA adapter, as far as it changes scores.

    Attributes:
        r: The rank of its changes.
        rank_pattern: Other ranks, by the ends of modules' names, as regular expressions.
        lora_alpha: What changes are multiplied by, before they are divided by their rank.
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
        """The rank of the change of a module."""
        for pattern, rank in self.rank_pattern.items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return rank
        return self.r

    def scale(self, module: str) -> float:
        """What the change of a module is multiplied by."""
        rank = self.rank(module)
        return self.lora_alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, weight: str) -> bool:
        """Whether the adapter is to have a change of a weight; ``False`` where that cannot be told."""
        module = weight.removesuffix(".weight")
        if self.target_modules is None or set(module.split(".")) & set(self.modules_to_save):
            return False
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, module) is not None
        return f".{module}".endswith(tuple(f".{end}" for end in self.target_modules))

    def has_saved(self, names: Iterable[str]) -> bool:
        """Whether a module that was trained whole is there; PEFT lists names of several kinds of heads."""
        parts = {part for name in names for part in name.split(".")}
        return not self.modules_to_save or bool(parts & {part.split(".")[-1] for part in self.modules_to_save})


def read_adapter_settings(directory: Path) -> AdapterSettings:
    """Read the configuration of an adapter.

    Args:
        directory: Has ``adapter_config.json``.

    Raises:
        ModelNotFoundError: The file is missing or damaged.
        UnsupportedModelError: It describes another kind of adapter.
    """
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


def _checked(fields: Mapping[str, Any]) -> AdapterSettings:
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
    return AdapterSettings(
        r=get("r", _RANK),
        rank_pattern=ranks,
        lora_alpha=alpha,
        use_rslora=rooted,
        modules_to_save=tuple(saved),
        target_modules=tuple(targets) if isinstance(targets, list) else targets,
    )
