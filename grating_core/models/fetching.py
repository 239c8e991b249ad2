"""This module fetches models from a hub. Importing it takes a while, because it imports the hub's client."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from fnmatch import fnmatch
from glob import escape
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from grating_core.errors import ModelNotFoundError
from grating_core.models.hub import MODEL_FILES, Hub
from grating_core.models.pickled import PATTERN, remedy_on_hub

_VOCABULARY = ("vocab.txt", "vocab.json", "merges.txt")  # tokenizer.json contains the same
# These settings change what is computed. The cache keeps the hub's list of files, so it shows which a model has.
_SETTINGS = (
    "config.json", "generation_config.json", "modules.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.*", "adapter_config.json",
    "model.safetensors.index.json", "config_sentence_transformers.json", "sentence_bert_config.json",
    "[0-9]*_*/config.json", "[0-9]*_*/model.safetensors",
)  # fmt: skip
# A module of sentence-transformers, in a folder such as 1_Pooling. Other folders hold exports to other formats.
_IN_MODULE = re.compile(r"\d+_[A-Za-z]\w*/[^/]+")
PATIENCE = 10.0
"""Seconds to wait for a hub that does not answer."""
_ANSWERED = (RevisionNotFoundError, LocalTokenNotFoundError)  # another attempt would not change these errors

_log = logging.getLogger("grating")
_said: set[Path] = set()


def fetch(hub: Hub, hub_id: str, is_whole: Callable[[Path], bool]) -> Path:
    """Return the directory of a model's files. Files that are not in the cache are fetched.

    If the hub cannot be reached, or answers with an error, a complete model in the cache is used, and a
    warning says so once.

    Args:
        hub: How the hub is asked.
        hub_id: ``owner/name``.
        is_whole: Function that tells whether a directory has all files that are needed.

    Raises:
        ModelNotFoundError: The model could not be fetched, and is not in the cache; the message says why.
    """
    kept = _kept(hub, hub_id)
    try:
        if hub.local_files_only or constants.HF_HUB_OFFLINE:
            return kept or _snapshot(hub, hub_id, _SETTINGS, local_files_only=True)
        return _fetched(hub, hub_id, kept)
    except ModelNotFoundError:
        raise
    except Exception as error:  # a hub may send anything, which may cause any error
        if kept is None or isinstance(error, _ANSWERED) or not is_whole(kept):
            raise _refusal(hub, hub_id, error) from error
        if kept not in _said:
            _said.add(kept)
            _log.warning("model=%r is used as it is kept in %s: %s", hub_id, kept, _reason(error))
        return kept


def _fetched(hub: Hub, hub_id: str, kept: Path | None) -> Path:
    # The hub is asked here first, with a limit of time, because the library that fetches files has no limit.
    version = hub.revision or constants.DEFAULT_REVISION
    found = HfApi(token=hub.token).model_info(hub_id, revision=version, timeout=PATIENCE)
    files = [escape(name) for name in _needed(hub_id, [file.rfilename for file in found.siblings or []])]
    directory = _snapshot(replace(hub, revision=found.sha), hub_id, files)
    if directory != kept:
        _snapshot(hub, hub_id, files)  # a version becomes the newest in the cache when all its files are there
    return directory


def _kept(hub: Hub, hub_id: str) -> Path | None:
    """Return the model's directory in the cache; None if there is none, or a file is known to be missing."""
    try:
        return _snapshot(hub, hub_id, _SETTINGS, local_files_only=True)
    except Exception:
        return None


def _snapshot(hub: Hub, hub_id: str, files: Iterable[str], *, local_files_only: bool = False) -> Path:
    return Path(
        snapshot_download(
            hub_id,
            revision=hub.revision,
            token=hub.token,
            cache_dir=hub.cache_dir,
            local_files_only=local_files_only,
            allow_patterns=list(files),
        )
    )


def _refusal(hub: Hub, hub_id: str, error: Exception) -> ModelNotFoundError:
    version = f" in revision {hub.revision!r}" if hub.revision else ""
    return ModelNotFoundError(
        f"model={hub_id!r}: there is no directory of that name here, and neither the hub nor its cache gave "
        f"the model{version} ({_reason(error)}). Check the name; for a private model pass token= or log in "
        f"with 'hf auth login'; offline, pass a local directory"
    )


def _needed(hub_id: str, names: Iterable[str]) -> list[str]:
    """Return those of the hub's files that are needed."""
    own = [name for name in names if "/" not in name or _IN_MODULE.fullmatch(name)]
    found = [name for name in own if name.endswith(MODEL_FILES)]
    pickled = [name for name in own if fnmatch(name, PATTERN)]
    if pickled and not any(name.endswith(".safetensors") for name in found):
        raise ModelNotFoundError(
            f"model={hub_id!r} has no safetensors on the hub, and grating never loads pickled weights"
            f"{remedy_on_hub(hub_id, pickled)}"
        )
    if "tokenizer.json" in found:
        found = [name for name in found if name not in _VOCABULARY and not name.endswith(".model")]
    if "config.json" not in found and "adapter_config.json" not in found:
        raise FileNotFoundError("the hub has no config.json of it")
    return found


def _reason(error: Exception) -> str:
    """Say why a hub did not give a model, in a sentence without a full stop."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        return _reason(error.__cause__)  # the cause says more
    told = next(iter(str(error).strip().splitlines()), "").rstrip(".")
    if isinstance(error, GatedRepoError):
        return "the hub gives it only to those who have been granted access"
    if isinstance(error, RevisionNotFoundError):
        return "the hub has no such revision"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has none of that name, or it is private"
    if isinstance(error, HfHubHTTPError):
        return f"the hub answered with the status {error.response.status_code}"
    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError | OSError):
        return told or type(error).__name__
    if isinstance(error, ValueError | TypeError | KeyError | AttributeError | AssertionError):
        return f"what answers there is no hub: {type(error).__name__} {told}".rstrip()
    return f"the hub cannot be used: {told or type(error).__name__}"
