"""This module fetches models from a hub: which version, as which user, and where to keep it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
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
from grating_core.files.places import expanded

MODEL_FILES = (".json", ".safetensors", ".txt", ".model", ".jinja")
_VOCABULARY = ("vocab.txt", "vocab.json", "merges.txt")  # tokenizer.json contains the same
# These settings change what is computed. The cache keeps the hub's list of files, so it shows which a model has.
_SETTINGS = (
    "config.json", "generation_config.json", "modules.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.*", "adapter_config.json",
    "model.safetensors.index.json",
)  # fmt: skip
PATIENCE = 10.0
"""Seconds to wait for a hub that does not answer."""
_ANSWERED = (RevisionNotFoundError, LocalTokenNotFoundError)  # another attempt would not change these errors
_REVISION = re.compile(r"(?!/)(?!.*\.\.)[^\s~^:?*\[\\]+")  # names that git allows

_log = logging.getLogger("grating")
_said: set[Path] = set()


@dataclass(frozen=True)
class Hub:
    """This class says how a hub is asked for a model. Local directories and bundled models ignore it.

    Attributes:
        revision: The branch, tag or commit; None for the newest on the main branch.
        token: The access token. None or True takes the one of ``hf auth login`` or ``HF_TOKEN``, False sends none.
            No message and no representation shows it.
        cache_dir: The directory of the hub's files; None for the one that ``HF_HUB_CACHE`` or ``HF_HOME`` names.
        local_files_only: Whether to use only files that are in this directory already; None means False.

    Raises:
        ValueError: An attribute is not usable; the message names it.
    """

    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | Path | None = None
    local_files_only: bool | None = False

    def __post_init__(self) -> None:
        revision, cache_dir = self.revision, self.cache_dir
        if revision is not None and not (isinstance(revision, str) and _REVISION.fullmatch(revision)):
            raise ValueError(f"revision={revision!r} must be the name of a branch, a tag or a commit, or None")
        if self.token is not None and not isinstance(self.token, bool) and not _is_token(self.token):
            raise ValueError(
                "token must be a string such as hf_… without spaces or line breaks, True, False or None; this "
                "message does not show the value"
            )
        if cache_dir is not None and not (isinstance(cache_dir, str | Path) and str(cache_dir)):
            raise ValueError(f"cache_dir={cache_dir!r} must be a directory or None")
        if cache_dir is not None and str(expanded(cache_dir)).startswith("~"):
            raise ValueError(
                f"cache_dir={str(cache_dir)!r} names the home directory of a user who is not known here"
            )
        if not isinstance(self.local_files_only, bool | None):
            raise ValueError(f"local_files_only={self.local_files_only!r} must be True or False")

    @property
    def newest(self) -> Hub:
        """The same settings without the revision, for another model than the one that the revision belongs to."""
        return replace(self, revision=None)

    def fetch(self, hub_id: str, is_whole: Callable[[Path], bool]) -> Path:
        """Return the directory of a model's files. Files that are not in the cache are fetched.

        If the hub cannot be reached, or answers with an error, a complete model in the cache is used, and a
        warning says so once.

        Args:
            hub_id: ``owner/name``.
            is_whole: Function that tells whether a directory has all files that are needed.

        Raises:
            ModelNotFoundError: The model could not be fetched, and is not in the cache; the message says why.
        """
        kept = self._kept(hub_id)
        try:
            if self.local_files_only or constants.HF_HUB_OFFLINE:
                return kept or self._snapshot(hub_id, _SETTINGS, local_files_only=True)
            return self._fetched(hub_id, kept)
        except Exception as error:  # a hub may send anything, which may cause any error
            if kept is None or isinstance(error, _ANSWERED) or not is_whole(kept):
                raise self._refusal(hub_id, error) from error
            if kept not in _said:
                _said.add(kept)
                _log.warning("model=%r is used as it is kept in %s: %s", hub_id, kept, _reason(error))
            return kept

    def _fetched(self, hub_id: str, kept: Path | None) -> Path:
        # The hub is asked here first, with a limit of time, because the library that fetches files has no limit.
        version = self.revision or constants.DEFAULT_REVISION
        found = HfApi(token=self.token).model_info(hub_id, revision=version, timeout=PATIENCE)
        files = [escape(name) for name in _needed(file.rfilename for file in found.siblings or [])]
        directory = replace(self, revision=found.sha)._snapshot(hub_id, files)
        if directory != kept:
            self._snapshot(hub_id, files)  # a version becomes the newest in the cache when all its files are there
        return directory

    def _kept(self, hub_id: str) -> Path | None:
        """Return the model's directory in the cache; None if there is none, or a file is known to be missing."""
        try:
            return self._snapshot(hub_id, _SETTINGS, local_files_only=True)
        except Exception:
            return None

    def _snapshot(self, hub_id: str, files: Iterable[str], *, local_files_only: bool = False) -> Path:
        return Path(
            snapshot_download(
                hub_id,
                revision=self.revision,
                token=self.token,
                cache_dir=self.cache_dir,
                local_files_only=local_files_only,
                allow_patterns=list(files),
                ignore_patterns=["*/*"],  # subfolders hold exports to other formats
            )
        )

    def _refusal(self, hub_id: str, error: Exception) -> ModelNotFoundError:
        version = f" in revision {self.revision!r}" if self.revision else ""
        return ModelNotFoundError(
            f"model={hub_id!r}: there is no directory of that name here, and neither the hub nor its cache gave "
            f"the model{version} ({_reason(error)}). Check the name; for a private model pass token= or log in "
            f"with 'hf auth login'; offline, pass a local directory"
        )


def _needed(names: Iterable[str]) -> list[str]:
    """Return those of the hub's files that are needed."""
    found = [name for name in names if name.endswith(MODEL_FILES) and "/" not in name]
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


def _is_token(token: object) -> bool:
    # The library that sends a token would show any other value in full in its error.
    return isinstance(token, str) and token != "" and token.isascii() and token.isprintable() and " " not in token
