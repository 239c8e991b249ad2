"""One process at a time writes an adapter's directory, which holds the state of training until training ends."""

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

STATE = "unfinished.safetensors"  # the state of training, until the adapter is there
_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"


def check_output(output: Path) -> None:
    """Refuse a directory that holds anything but the state of unfinished training.

    Raises:
        ValueError: The directory holds something else, or is a file.
    """
    if not is_there(output):
        return
    if not output.is_dir():
        raise ValueError(f"output={str(output)!r} is a file; name a directory")
    # Half-written files of a killed process do not count: they are removed when our files are written.
    with storing(output):
        there = {unfinished_of(path.name) or path.name for path in output.iterdir()}
    # A process that was killed while it wrote the adapter leaves the state and both files of the adapter.
    if others := there - ({STATE, _WEIGHTS, _CONFIG} if STATE in there else set()):
        raise ValueError(
            f"output={str(output)!r} already holds {', '.join(sorted(others)[:3])}; name a new directory, "
            f"or an empty one"
        )


@contextmanager
def writing_alone(output: Path) -> Iterator[None]:
    """Keep other processes from writing to the same directory. Remove the directory if it stays empty.

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
            f"output={str(output)!r} cannot be written ({error}). The last saved state is kept: the same call "
            f"goes on from it when there is room"
        ) from error
    finally:
        if made:
            with suppress(OSError):
                output.rmdir()


def write_adapter(output: Path, model: str, mlp_density: float, rank: int, changes: Mapping[str, Tensor]) -> None:
    """Replace the state by the adapter, in PEFT's form.

    The adapter's description is written last, because nothing counts as an adapter without it.

    Args:
        output: The directory.
        model: Name of the base model.
        mlp_density: The density that the adapter was trained for.
        rank: Rank of the changes.
        changes: The adapter's weights, by PEFT's names.
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
