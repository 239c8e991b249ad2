"""A model's configuration and tensors are read in the same way from a directory and from a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from grating_core.errors import FileError, ModelNotFoundError, UnsupportedModelError
from grating_core.lifetime import closed_on_error
from grating_core.memory.blocks import READABLE
from grating_core.memory.checkpoint import Checkpoint
from grating_core.memory.header import StoredTensor
from grating_core.models.agreement import check_complete, check_stored, check_taken
from grating_core.models.directory import blaming_config, is_gguf, read_config, weight_files
from grating_core.models.family import Configuration, Family
from grating_core.models.gguf import gguf_tensors, read_gguf_config
from grating_core.models.layout import Shape, modern_name
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
) -> tuple[Checkpoint, dict[str, StoredTensor]]:
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
        if alone:
            tensors = gguf_tensors(checkpoint.tensors, config)
        else:
            tensors = {modern_name(name): tensor for name, tensor in checkpoint.tensors.items()}
        check_stored(path, config, tensors)
    return checkpoint, tensors


def fitting_tensors(
    directory: Path, family: Family, stored: Mapping[str, StoredTensor], wanted: Mapping[str, Shape]
) -> dict[str, StoredTensor]:
    """Return the stored tensor for each wanted name.

    Args:
        directory: The model directory, or the GGUF file.
        family: The model's family.
        stored: The stored tensors, by name.
        wanted: The shapes of the wanted tensors, by name.

    Raises:
        ModelNotFoundError: A tensor is missing, or has another shape.
        UnsupportedModelError: A tensor is of a kind that grating does not read, or would not be used.
    """
    check_taken(family, stored, wanted)
    check_complete(directory, family, stored, wanted)
    for name, shape in wanted.items():
        tensor = stored[name]
        if tensor.kind not in READABLE:
            raise UnsupportedModelError(
                f"{tensor.path} stores {name} as {tensor.kind}: quantised weights are not supported; use the "
                f"checkpoint in float32, float16 or bfloat16"
            )
        if tensor.shape != shape:
            config = tensor.path if is_gguf(tensor.path) else tensor.path.with_name("config.json")
            raise ModelNotFoundError(
                f"{config} does not describe a model that fits its weights: {name} should be {list(shape)} and is "
                f"stored as {list(tensor.shape)}"
            )
    return {name: stored[name] for name in wanted}
