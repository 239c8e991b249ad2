"""The identity of a model distinguishes its weights from those of other models."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from grating_core.memory.checkpoint import Checkpoint
from grating_core.memory.header import StoredTensor
from grating_core.models.adapter import Adapter
from grating_core.models.directory import is_gguf, weight_files
from grating_core.models.modules import read_head

_SAMPLE = 512  # bytes
_SAMPLES_OF_FILE = 64


def fingerprint(model: Path, adapter: Adapter | None = None, asked: str = "") -> str:
    """Return the identity of a model, which differs from that of every other model.

    A lens, columns and whatever else is kept for a model is kept under its identity. The identity covers

    * the model's tensors: the name, type and shape of each, and a few of its bytes, at its beginning and in its
      middle. Reading all bytes would take as long as loading;
    * the settings of the modules that its head is made of;
    * the adapter that is merged into them: every byte of it, and the scales in its configuration;
    * the question that the model is asked, and the answers whose logits are the score, but not the instruction.

    The identity is the same on every machine, with any number of threads, and in any directory. Files without
    weights do not count. The compute dtype does not count either: a lens fits the model in any dtype, with margins
    of their own for 8 bits, and the names of companion files say their dtypes.

    Args:
        model: A model directory, or a GGUF file.
        adapter: The adapter that is merged into the model; None for none.
        asked: The question, see :attr:`Prompt.asked`; empty for a model that is not asked.

    Returns:
        A SHA-256 digest as 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    if is_gguf(model):
        _add_file(digest, model)
    else:
        checkpoint = Checkpoint(weight_files(model))
        checkpoint.close()  # only the places of the tensors are needed
        _add_tensors(digest, checkpoint.tensors.values())
        if (head := read_head(model)) is not None:
            digest.update(f"{head} ".encode())
    if adapter is not None:
        digest.update(f"adapter {adapter.identity} ".encode())
    digest.update(asked.encode())
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
