"""One process at a time writes the directory of an adapter, which holds the state until the adapter is done."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors.torch import save as format_tensors
from torch import Tensor

from grating_core.errors import StorageError
from grating_core.files.locks import locked, unfinished_of
from grating_core.files.places import is_there, storing
from grating_core.files.writing import replace_file
from grating_core.lab.student import PARTS

STATE = "unfinished.safetensors"  # what training has reached, until the adapter is there
_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"


def check_output(output: Path) -> None:
    """Refuse a directory that holds anything but the state of unfinished training.

    Raises:
        ValueError: It holds something else, or is a file.
    """
    if not is_there(output):
        return
    if not output.is_dir():
        raise ValueError(f"output={str(output)!r} is a file; name a directory")
    # What a process that was killed left half-written of our files is removed when they are written.
    with storing(output):
        there = {unfinished_of(path.name) or path.name for path in output.iterdir()}
    # A process that ended while it wrote the adapter leaves all three.
    if others := there - ({STATE, _WEIGHTS, _CONFIG} if STATE in there else set()):
        raise ValueError(
            f"output={str(output)!r} already holds {', '.join(sorted(others)[:3])}; name a new directory, "
            f"or an empty one"
        )


@contextmanager
def writing_alone(output: Path) -> Iterator[None]:
    """Keep other processes from writing to the same directory, and leave none if nothing is in it.

    Raises:
        ValueError: Another process is writing there.
        StorageError: Nothing can be written; the message names ``output`` and says how to go on.
    """
    made = not is_there(output)
    try:
        with locked(output / STATE, wait=False) as alone:
            if not alone:
                raise ValueError(
                    f"output={str(output)!r} is being written by another process: wait for it, or name another "
                    f"directory"
                )
            yield
    except StorageError as error:
        raise StorageError(
            f"output={str(output)!r} cannot be written ({error}). What was reached before is kept: when there is "
            f"room, the same call goes on from it"
        ) from error
    finally:
        if made:
            with suppress(OSError):
                output.rmdir()


def write_adapter(output: Path, model: str, mlp_density: float, rank: int, changes: Mapping[str, Tensor]) -> None:
    """Put the adapter, as PEFT saves one, in the place of the state.

    Its description goes last, since without it there is no adapter.

    Args:
        output: The directory.
        model: Name of the model that it is for.
        mlp_density: Share of the MLPs' weights for which it was trained.
        rank: Rank of the changes.
        changes: The weights, by PEFT's names.
    """
    tensors = {name: change.detach().contiguous() for name, change in changes.items()}
    data = format_tensors(tensors, {"format": "pt", "mlp_density": str(mlp_density)})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": list(PARTS),
        "bias": "none",
        "inference_mode": True,
    }
    replace_file(output / _WEIGHTS, data)
    replace_file(output / _CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    (output / STATE).unlink()
