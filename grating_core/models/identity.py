"""What tells the weights of one model from those of another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from grating_core.memory.checkpoint import Checkpoint
from grating_core.memory.header import StoredTensor
from grating_core.models.adapter import Adapter
from grating_core.models.directory import weight_files
from grating_core.models.gguf import is_gguf
from grating_core.text.prompts import Prompt

_SAMPLE = 512  # bytes
_SAMPLES_OF_FILE = 64


def fingerprint(model: Path, adapter: Adapter | None = None, prompt: Prompt | None = None) -> str:
    """What tells the weights of one model, and how they are used, from those of another: its identity.

    All that is kept for a model (lenses, the state of recalibration, columns) is kept under this. It covers

    * the model's tensors: of each the name, type and shape, and a few bytes at its beginning and in its middle.
      Reading all would take as long as loading;
    * the adapter that is merged into them: every byte of it, and what its configuration multiplies it by;
    * the question that it is asked, and the answers whose logits are the score, but not the instruction.

    It is the same on every machine, with any number of threads, and wherever the files lie. Files that hold no
    weights, the compute dtype and the memory budget do not count.

    Args:
        model: A model directory, or a GGUF file.
        adapter: What is merged into it, if anything is.
        prompt: What it is asked, if it is.
    """
    digest = hashlib.sha256()
    if is_gguf(model):
        _add_file(digest, model)
    else:
        checkpoint = Checkpoint(weight_files(model))
        checkpoint.close()  # what is in which place is all that is needed
        _add_tensors(digest, checkpoint.tensors.values())
    if adapter is not None:
        digest.update(f"adapter {adapter.identity} ".encode())
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
