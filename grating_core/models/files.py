"""A model's configuration and tensors are read in the same way from a directory and from a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from grating_core.errors import FileError, ModelNotFoundError
from grating_core.lifetime import closed_on_error
from grating_core.memory.checkpoint import Checkpoint
from grating_core.memory.header import StoredTensor
from grating_core.models.agreement import check_stored
from grating_core.models.directory import blaming_config, is_gguf, read_config, weight_files
from grating_core.models.family import Configuration
from grating_core.models.gguf import gguf_tensors, read_gguf_config
from grating_core.models.modules import transformer_folder


def find_config(directory: Path) -> Configuration:
    """Read the configuration of a model.

    Args:
        directory: The model directory, or the GGUF file.

    Raises:
        ModelNotFoundError: The configuration is missing or damaged, or makes no sense.
        UnsupportedModelError: grating does not run the architecture, or does not implement one of the settings.
    """
    return read_gguf_config(directory) if is_gguf(directory) else read_config(directory)


def open_weights(
    directory: Path, config: Configuration, *, lasting: bool
) -> tuple[Checkpoint, Mapping[str, StoredTensor]]:
    """Open the files of a model.

    Args:
        directory: The model directory, or the GGUF file.
        config: The model's configuration.
        lasting: See :class:`Checkpoint`.

    Returns:
        The files, and the place of each tensor by the name that it has in a checkpoint of the family.

    Raises:
        ModelNotFoundError: Weights are missing or damaged, or do not fit the configuration.
        UnsupportedModelError: The weights are of a kind that grating does not read.
    """
    alone = is_gguf(directory)
    try:
        checkpoint = Checkpoint([directory] if alone else weight_files(directory), lasting=lasting)
    except (FileError, OSError) as error:
        raise ModelNotFoundError(
            f"the weights cannot be read as {'GGUF' if alone else 'safetensors'} ({error}); delete them and fetch "
            f"the model again"
        ) from error
    path = directory if alone else transformer_folder(directory) / "config.json"
    with closed_on_error(checkpoint), blaming_config(path):
        tensors = gguf_tensors(checkpoint.tensors, config) if alone else checkpoint.tensors
        check_stored(path, config, tensors)
    return checkpoint, tensors
