"""This module finds a model's directory by name, and reads its configuration before any weight."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from grating_core.errors import FileError, GratingError, ModelNotFoundError
from grating_core.files.places import expanded, is_there
from grating_core.files.reading import read_json, read_json_or
from grating_core.memory.checkpoint import Checkpoint
from grating_core.memory.header import StoredTensor
from grating_core.models.agreement import check_implemented, check_values
from grating_core.models.bundled import BUNDLED_PREFIX, bundled_model
from grating_core.models.elsewhere import known_elsewhere
from grating_core.models.families import find_family, find_transformer
from grating_core.models.family import Configuration, Family, Fields
from grating_core.models.hub import MODEL_FILES, Hub
from grating_core.models.labels import read_labels
from grating_core.models.modules import (
    activation_function,
    check_width,
    is_inside,
    read_head,
    transformer_folder,
)
from grating_core.models.pickled import remedy

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def find_model(name: str, *, hub: Hub | None = None, show_progress: bool = False) -> Path:
    """Return the local directory of a model, or its GGUF file. The model is fetched or converted if necessary.

    Args:
        name: ``bundled:…``, a local directory in Hugging Face layout, a ``.gguf`` file, or a hub id. A directory
            wins over a hub id of the same name. The hub's cache and offline variables are honoured.
        hub: How the hub is asked; None asks for the newest version, as the user who is logged in.
        show_progress: Whether to show progress bars on standard error.

    Raises:
        ModelNotFoundError: The name leads to no usable model; the message says what was looked for and where.
    """
    if name.startswith(BUNDLED_PREFIX):
        return bundled_model(name, show_progress=show_progress)
    directory = expanded(name)
    if name.endswith(".gguf") and os.path.isfile(directory):  # noqa: PTH113 - as below
        return directory
    if name and os.path.isdir(directory):  # noqa: PTH112 - Path.is_dir raises for names that are too long
        _check_files(directory)
        return directory
    if name and is_there(directory):
        raise ModelNotFoundError(
            f"model={name!r} is no directory: name the directory that holds the model's files"
        )
    if (sentence := known_elsewhere(name)) is not None:
        raise ModelNotFoundError(sentence)
    if not re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", name) or name.startswith("."):
        looked = f"there is no directory {directory.absolute()}, and " if name else ""
        raise ModelNotFoundError(
            f"model={name!r}: {looked}this is not a hub id (owner/name) nor a bundled name ({BUNDLED_PREFIX}…)"
        )
    from grating_core.models.fetching import fetch  # slow to import

    return fetch(hub or Hub(), name, _is_whole)


def is_gguf(path: Path) -> bool:
    """Tell whether a model is a GGUF file."""
    return path.suffix == ".gguf" and os.path.isfile(path)  # noqa: PTH113 - Path.is_file raises for closed directories


def _is_whole(directory: Path) -> bool:
    """Tell whether a directory from the hub's cache holds all files of an adapter or a model."""
    try:
        if (directory / "adapter_config.json").is_file():
            return (directory / "adapter_model.safetensors").is_file()
        folder = transformer_folder(directory)
        return (folder / "config.json").is_file() and has_tokenizer(folder) and bool(weight_files(directory))
    except (GratingError, OSError):
        return False


def has_tokenizer(directory: Path) -> bool:
    """Tell whether there is a file with a vocabulary. Without one, transformers makes an empty vocabulary."""
    return any(any(directory.glob(pattern)) for pattern in ("tokenizer.json", "vocab.*", "*.model"))


def _check_files(directory: Path) -> None:
    """Refuse anything that is no regular file: opening a named pipe would wait for ever."""
    for path in directory.iterdir():
        if path.suffix in MODEL_FILES and path.exists() and not path.is_file() and not path.is_dir():
            raise ModelNotFoundError(f"{path} is not a regular file")


def read_config(directory: Path) -> Configuration:
    """Read the configuration of a model directory.

    Raises:
        ModelNotFoundError: There is no readable ``config.json``, or its content makes no sense.
        UnsupportedModelError: grating does not run this architecture, does not implement one of the settings, or
            the labels give no relevance score.
    """
    head, stated = read_head(directory), read_stated(directory)
    architectures = stated["architectures"]
    family = (find_family if head is None else find_transformer)(architectures)
    if family.variants:
        family = family.fitting(read_headers(directory))
    if head is not None:
        family = head.instead_of(family)
    fields, spec, family = describe(transformer_folder(directory) / "config.json", stated, family)
    check_width(directory, spec)
    return Configuration(fields, spec, family)


def shows_logits(directory: Path) -> bool:
    """Tell whether sentence-transformers shows a model's raw scores, because its files name ``Identity``.

    Args:
        directory: The model's directory, or its GGUF file.

    Raises:
        ModelNotFoundError: The files are damaged.
    """
    if not directory.is_dir():
        return False
    activation = activation_function(directory, read_stated(directory)) or ""
    return activation.startswith("torch.") and activation.endswith(".Identity")


def read_stated(directory: Path) -> Fields:
    """Return what the ``config.json`` of a model directory says, with a list of architectures that may be empty.

    Raises:
        ModelNotFoundError: There is no readable ``config.json``.
    """
    path = transformer_folder(directory) / "config.json"
    try:
        stated = read_json(path)
        return {**stated, "architectures": [str(name) for name in stated.get("architectures") or []]}
    except FileNotFoundError as error:
        raise ModelNotFoundError(f"{path.parent} is not a model directory: it has no config.json") from error
    except (ValueError, OSError, AttributeError, TypeError) as error:
        raise ModelNotFoundError(f"{path} cannot be read as a configuration: {error}") from error


def describe(path: Path, stated: Fields, family: Family) -> Configuration:
    """Return the configuration of a model, after refusing what no model has and what grating does not implement.

    Args:
        path: The file that errors name.
        stated: The fields that the file has.
        family: The model's family.

    Raises:
        ModelNotFoundError: A value makes no sense.
        UnsupportedModelError: grating does not implement a value, or the labels give no relevance score.
    """
    with blaming_config(path):
        stated = family.usual(stated)
        check_values(path, stated, family)
        fields = {name: stated.get(name, default) for name, default in family.defaults.items()}
        check_implemented(path, stated, fields, family)
        spec = family.spec(fields)
        if "num_labels" in fields:
            spec = replace(spec, labels=read_labels(path, stated))
        return Configuration(fields, spec, family)


def end_tokens(directory: Path, fields: Fields) -> frozenset[int]:
    """Return the tokens that end a text: those of ``generation_config.json`` and of the configuration.

    Args:
        directory: The model directory.
        fields: The fields of its configuration.

    Raises:
        ModelNotFoundError: ``generation_config.json`` is damaged.
    """
    path = directory / "generation_config.json"
    try:
        found = [read_json_or(path, {}).get("eos_token_id"), fields.get("eos_token_id")]
        return frozenset(
            int(token) for one in found for token in (one if isinstance(one, list) else [one]) if token is not None
        )
    except (ValueError, OSError, AttributeError, TypeError) as error:
        raise ModelNotFoundError(f"{path} cannot be read: {error}") from error


@contextmanager
def blaming_config(config: Path) -> Iterator[None]:
    """Turn the many kinds of errors that a senseless configuration causes into one that names the file."""
    try:
        yield
    except GratingError:
        raise
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        raise ModelNotFoundError(f"{config} does not describe a model that fits its weights: {reason}") from error


@contextmanager
def blaming_weights() -> Iterator[None]:
    """Turn an error of reading weights into one of the model."""
    try:
        yield
    except FileError as error:
        raise ModelNotFoundError(f"{error}; delete the file and fetch the model again") from error


def weight_files(directory: Path) -> dict[Path, str]:
    """Return the safetensors files of a model directory, with what comes before the names of their tensors.

    Raises:
        ModelNotFoundError: The files are not all there.
    """
    head = read_head(directory)
    files = dict.fromkeys(_files(transformer_folder(directory)), "")
    for folder in () if head is None else head.folders:
        files |= dict.fromkeys(_files(directory / folder), f"{folder}/")
    return files


def _files(directory: Path) -> list[Path]:
    """Return the safetensors files of one folder."""
    index = directory / _INDEX
    if index.exists():
        try:
            names = sorted(set(read_json(index)["weight_map"].values()))
            files = [directory / name for name in names]
        except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
            raise ModelNotFoundError(f"{index} cannot be read: {error!r}") from error
        if strangers := [name for name in names if not is_inside(name)]:
            raise ModelNotFoundError(
                f"{index} names {strangers[0]!r}, which is not a file in the model's own directory"
            )
    else:
        files = [directory / _WEIGHTS]
    absent = [path.name for path in files if not os.path.isfile(path)]  # noqa: PTH113 - as in find_model
    if absent:
        raise ModelNotFoundError(
            f"{directory} lacks {', '.join(absent)}. Only safetensors are loaded, never pickled weights"
            f"{remedy(directory) or ': fetch the model again'}"
        )
    return files


def read_headers(directory: Path) -> dict[str, StoredTensor]:
    """Return the place of each tensor of a model directory, by name.

    Raises:
        ModelNotFoundError: The files are not all there, or are not safetensors.
    """
    try:
        checkpoint = Checkpoint(weight_files(directory))
    except (FileError, OSError) as error:
        raise ModelNotFoundError(
            f"the weights cannot be read as safetensors ({error}); delete them and fetch the model again"
        ) from error
    checkpoint.close()
    return checkpoint.tensors


def describe_weights(directory: Path) -> dict[str, Any]:
    """Return the architecture, depth and size in bytes of a model directory, without loading it."""
    _, spec, family = read_config(directory)
    return {
        "architecture": family.architecture,
        "layers": spec.depth,
        "bytes": sum(path.stat().st_size for path in weight_files(directory)),
    }
