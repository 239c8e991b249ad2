"""What tells the weights of one model from those of another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from grating_core.memory.checkpoint import Checkpoint
from grating_core.memory.header import StoredTensor
from grating_core.models.directory import weight_files
from grating_core.models.gguf import is_gguf
from grating_core.models.prompts import Prompt

_SAMPLE = 512  # bytes
_SAMPLES_OF_FILE = 64


def fingerprint(model: Path, adapter: Path | None, prompt: Prompt | None) -> str:
    """What tells the weights of one model, and what it is asked, from those of another.

    Of each tensor the name, type and shape count, and a few bytes: reading all would take as long as loading.

    Args:
        model: A model directory, or a GGUF file.
        adapter: The directory of the adapter that is merged into it, if any.
        prompt: What it is asked, if it is. The instruction does not count.
    """
    digest = hashlib.sha256()
    for path in (model, adapter):
        if path is not None and is_gguf(path):
            _add_file(digest, path)
        elif path is not None:
            files = weight_files(path) if path is model else [path / "adapter_model.safetensors"]
            checkpoint = Checkpoint(files)
            checkpoint.close()  # what is in which place is all that is needed
            _add_tensors(digest, checkpoint.tensors.values())
    if prompt is not None:
        digest.update(json.dumps((prompt.pieces, prompt.yes, prompt.no)).encode())
    return digest.hexdigest()


def _add_tensors(digest: Any, tensors: Iterable[StoredTensor]) -> None:
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        digest.update(f"{tensor.name} {tensor.kind} {tensor.shape} ".encode())
        with tensor.path.open("rb") as file:
            for start in (tensor.start, (tensor.start + tensor.end) // 2):
                file.seek(start)
                digest.update(file.read(min(_SAMPLE, tensor.end - start)))


def _add_file(digest: Any, path: Path) -> None:
    size = path.stat().st_size
    digest.update(f"{size} ".encode())
    with path.open("rb") as file:
        for number in range(_SAMPLES_OF_FILE):
            file.seek(size * number // _SAMPLES_OF_FILE)
            digest.update(file.read(_SAMPLE))
