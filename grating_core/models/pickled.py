"""Pickled weights may run code when they are read, so grating never reads them. It says how to convert them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from grating_core.models.modules import read_object

PATTERN = "pytorch_model*.bin"
"""The names of files with pickled weights."""
_CLASS = "AutoModelForSequenceClassification"


def remedy(directory: Path) -> str:
    """Return the sentence that says how the pickled weights in a folder are converted; empty if it has none."""
    if not (files := sorted(path.name for path in directory.glob(PATTERN))):
        return ""
    architectures = read_object(directory / "config.json").get("architectures") or []
    return _sentence(", ".join(files), conversion(str(directory), str(directory), architectures))


def remedy_on_hub(hub_id: str, files: Sequence[str]) -> str:
    """Return the sentence that says how a model with these pickled weights on a hub is converted."""
    target = hub_id.rpartition("/")[2]
    tokenizer = f"T.from_pretrained({hub_id!r}).save_pretrained({target!r})"
    command = conversion(hub_id, target, [_CLASS], f"; from transformers import AutoTokenizer as T; {tokenizer}")
    return f"{_sentence(', '.join(files), command)}, and take the directory {target!r} as the model"


def conversion(source: str, target: str, architectures: Sequence[str], then: str = "") -> str:
    """Return a command that converts pickled weights without running their code.

    Args:
        source: The directory or the hub id of the model.
        target: The directory for the converted model, which may be the same.
        architectures: What its configuration says. Without a class of transformers, tensors are converted alone.
        then: Code that is run behind it.
    """
    import transformers  # slow to import

    classes = [name for name in architectures if hasattr(transformers, name)]
    if classes:
        code = (
            f"from transformers import {classes[0]} as M; M.from_pretrained({source!r}, weights_only=True)"
            f".save_pretrained({target!r}, safe_serialization=True){then}"
        )
    else:
        place = f"{source}/pytorch_model.bin", f"{target}/model.safetensors"
        code = (
            f"import torch; from safetensors.torch import save_file; w = torch.load({place[0]!r}, 'cpu', "
            f"weights_only=True); save_file({{n: t.clone() for n, t in w.items()}}, {place[1]!r}, "
            f"{{'format': 'pt'}})"
        )
    return f"python -c {shlex.quote(code)}"


def _sentence(files: str, command: str) -> str:
    return f": the weights are in {files}. Convert them once, without running what they hold: {command}"
