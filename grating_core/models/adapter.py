"""Adapters as PEFT saves them: low-rank changes of weights, and weights of their own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from grating_core.errors import ModelNotFoundError, UnsupportedModelError
from grating_core.models.directory import find_model
from grating_core.models.hub import Hub

_WEIGHTS = "adapter_model.safetensors"
_BEFORE = "base_model.model."
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

    Args:
        directory: Has ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        ModelNotFoundError: The files are missing or damaged.
        UnsupportedModelError: It is another kind of adapter.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        settings = _read_settings(directory)
        try:
            stored = {
                name.removeprefix(_BEFORE): tensor for name, tensor in load_file(directory / _WEIGHTS).items()
            }
        except Exception as error:  # safetensors raises an error of its own that is no OSError
            raise ModelNotFoundError(f"{directory / _WEIGHTS} cannot be read: {error}") from error
        rank_root = 0.5 if settings.get("use_rslora") else 1.0
        self.changes: dict[str, LowRank] = {}
        self.weights: dict[str, Tensor] = {}
        for name, tensor in stored.items():
            if name.endswith(".lora_A.weight"):
                module = name.removesuffix(".lora_A.weight")
                if (up := stored.get(f"{module}.lora_B.weight")) is None:
                    raise ModelNotFoundError(f"{directory / _WEIGHTS} has {name}, and no lora_B beside it")
                scale = settings["lora_alpha"] / len(tensor) ** rank_root
                self.changes[f"{module}.weight"] = LowRank(tensor.float(), up.float() * scale)
            elif ".lora_" not in name:
                self.weights[name] = tensor.float()
            elif not name.endswith(".lora_B.weight"):
                raise UnsupportedModelError(
                    f"the adapter in {directory} has {name}, which is no change of a layer"
                )

    def digest(self) -> str:
        """Tells what it changes, and by how much, from the changes of other adapters."""
        digest = hashlib.sha256()
        for name, change in sorted(self.changes.items()):
            digest.update(f"{name} {change.shape} {float(change.down.abs().sum())} ".encode())
            digest.update(f"{float(change.up.abs().sum())} {float(change.up.sum())} ".encode())
        return digest.hexdigest()

    @property
    def size(self) -> int:
        """Bytes in memory."""
        tensors = [part for change in self.changes.values() for part in (change.down, change.up)]
        return sum(tensor.nbytes for tensor in (*tensors, *self.weights.values()))

    def check(self, shapes: Mapping[str, tuple[int, ...]], head: Collection[str]) -> None:
        """Compare with the weights of a model.

        Args:
            shapes: Of its weights, by name.
            head: Names of those that belong to the head.

        Raises:
            UnsupportedModelError: The adapter was made for another model, or replaces more than the head.
        """
        if others := self.weights.keys() & shapes.keys() - set(head):
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


def _read_settings(directory: Path) -> dict[str, Any]:
    path = directory / "adapter_config.json"
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind, _ = settings["peft_type"], settings["lora_alpha"] + 0.0
    except FileNotFoundError as error:
        raise ModelNotFoundError(
            f"adapter={str(directory)!r} is not an adapter's directory: it has no adapter_config.json"
        ) from error
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ModelNotFoundError(f"{path} cannot be read as an adapter's configuration: {error!r}") from error
    # What these say would change the arithmetic.
    others = [name for name in ("use_dora", "fan_in_fan_out", "alpha_pattern", "lora_bias") if settings.get(name)]
    # These change the base weights as well when PEFT loads them.
    if str(settings.get("init_lora_weights")).startswith(("pissa", "olora", "corda", "loftq")):
        others.append("init_lora_weights")
    if kind != "LORA" or others:
        raise UnsupportedModelError(
            f"{path} describes peft_type={kind!r} with {others}; plain LoRA is supported. Merge it into its base "
            f"with PEFT's merge_and_unload() and load the result"
        )
    return settings
