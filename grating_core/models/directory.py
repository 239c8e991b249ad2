"""From a model's name to a directory, and what its configuration and files say before any weight is read."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grating_core.errors import GratingError, ModelNotFoundError, UnsupportedModelError
from grating_core.files import expanded
from grating_core.models.bundled import BUNDLED_PREFIX, bundled_model
from grating_core.models.elsewhere import known_elsewhere
from grating_core.models.families import Config, Family, find_family
from grating_core.models.hub import Hub

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def find_model(name: str, *, hub: Hub | None = None, show_progress: bool = False) -> Path:
    """The local directory of a model, fetched or converted first where needed; or its GGUF file.

    Args:
        name: ``bundled:…``, a local directory in Hugging Face layout, a ``.gguf`` file, or a hub id. A directory
            wins over a hub id of the same name. The hub's cache and offline variables are honoured.
        hub: How the hub is asked; None for the newest version, as whoever is logged in.
        show_progress: Show progress bars on standard error.

    Raises:
        ModelNotFoundError: Nothing usable is there; the message says what was looked for and where.
    """
    if name.startswith(BUNDLED_PREFIX):
        return bundled_model(name, show_progress=show_progress)
    directory = expanded(name)
    if name.endswith(".gguf") and os.path.isfile(directory):  # noqa: PTH113 - as below
        return directory
    if name and os.path.isdir(directory):  # noqa: PTH112 - Path.is_dir raises for names that are too long
        return directory
    if (sentence := known_elsewhere(name)) is not None:
        raise ModelNotFoundError(sentence)
    if not re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", name) or name.startswith("."):
        raise ModelNotFoundError(
            f"model={name!r}: there is no directory {directory.absolute()}, and this is not a hub id "
            f"(owner/name) nor a bundled name ({BUNDLED_PREFIX}…)"
        )
    return (hub or Hub()).fetch(name)


def read_config(directory: Path) -> tuple[Config, Family]:
    """The configuration of a model directory, and the family it belongs to.

    Raises:
        ModelNotFoundError: There is no readable ``config.json``.
        UnsupportedModelError: grating does not run this architecture, or it has other than one label.
    """
    path = directory / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        architectures = list(fields.get("architectures") or [])
    except FileNotFoundError as error:
        raise ModelNotFoundError(f"{directory} is not a model directory: it has no config.json") from error
    except (ValueError, OSError, AttributeError, TypeError) as error:
        raise ModelNotFoundError(f"{path} cannot be read as a configuration: {error}") from error
    family = find_family(architectures)
    # The class is chosen by the family, so code that the checkpoint may bring along is never looked at.
    with blaming_config(path):
        config = family.config(fields)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        raise UnsupportedModelError(
            f"{path} has rope_type='longrope', with which a score depends on what is beside it"
        )
    if family.causal and getattr(config, "use_bidirectional_attention", False):
        raise UnsupportedModelError(f"{path} has use_bidirectional_attention; only causal decoders are supported")
    if family.head_module is None and config.num_labels != 1:
        raise UnsupportedModelError(
            f"{path} describes {config.num_labels} labels; a reranker has one relevance score. "
            f"Classifiers with several labels cannot rank"
        )
    config.chunk_size_feed_forward = 0  # grating does the chunking, along the packed axis
    return config, family


def end_tokens(directory: Path, config: Config) -> frozenset[int]:
    """The tokens that end a text: those of ``generation_config.json``, or else of the configuration.

    Raises:
        ModelNotFoundError: ``generation_config.json`` is damaged.
    """
    path = directory / "generation_config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        found = fields.get("eos_token_id", getattr(config, "eos_token_id", None))
        return frozenset(map(int, found if isinstance(found, list) else [] if found is None else [found]))
    except (ValueError, OSError, AttributeError, TypeError) as error:
        raise ModelNotFoundError(f"{path} cannot be read: {error}") from error


@contextmanager
def blaming_config(config: Path) -> Iterator[None]:
    """Tell whose fault it is: transformers and torch raise errors of many kinds for a senseless configuration."""
    try:
        yield
    except GratingError:
        raise
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        raise ModelNotFoundError(f"{config} does not describe a model that fits its weights: {reason}") from error


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory.

    Raises:
        ModelNotFoundError: They are not all there.
    """
    index = directory / _INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            files = [directory / name for name in names]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelNotFoundError(f"{index} cannot be read: {error!r}") from error
    else:
        files = [directory / _WEIGHTS]
    absent = [path.name for path in files if not path.is_file()]
    if absent:
        raise ModelNotFoundError(
            f"{directory} lacks {', '.join(absent)}. Only safetensors are loaded, never pickled weights "
            f"(pytorch_model.bin): convert those with save_pretrained first"
        )
    return files


def describe_weights(directory: Path) -> dict[str, Any]:
    """Architecture, depth and size in bytes of a model directory, without loading it."""
    config, family = read_config(directory)
    return {
        "architecture": family.architecture,
        "layers": config.num_hidden_layers,
        "bytes": sum(path.stat().st_size for path in weight_files(directory)),
    }
