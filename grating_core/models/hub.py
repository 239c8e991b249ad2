"""Models that are on a hub: which version, who asks, and where it is kept."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from grating_core.errors import ModelNotFoundError

MODEL_FILES = (".json", ".safetensors", ".txt", ".model", ".jinja")
_REVISION = re.compile(r"(?!/)(?!.*\.\.)[^\s~^:?*\[\\]+")  # what git takes as a name


@dataclass(frozen=True)
class Hub:
    """How a hub is asked for a model. For local directories, GGUF files and bundled models it means nothing.

    Attributes:
        revision: Branch, tag or commit; None for the newest on the main branch.
        token: What proves who asks; None or True for the one of ``hf auth login`` or ``HF_TOKEN``, False for none.
            It is in no message and no representation.
        cache_dir: Where the hub's files are kept; None for the place that ``HF_HUB_CACHE`` or ``HF_HOME`` says.
        local_files_only: Whether only what is kept there already is used.

    Raises:
        ValueError: One of them is not usable; the message names it.
    """

    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | Path | None = None
    local_files_only: bool = False

    def __post_init__(self) -> None:
        revision, cache_dir = self.revision, self.cache_dir
        if revision is not None and not (isinstance(revision, str) and _REVISION.fullmatch(revision)):
            raise ValueError(f"revision={revision!r} must be the name of a branch, a tag or a commit, or None")
        if self.token is not None and not isinstance(self.token, bool) and not _is_token(self.token):
            raise ValueError(
                "token must be a string such as hf_… without spaces or line breaks, True, False or None; what was "
                "given is not shown here"
            )
        if cache_dir is not None and not (isinstance(cache_dir, str | Path) and str(cache_dir)):
            raise ValueError(f"cache_dir={cache_dir!r} must be a directory or None")
        if not isinstance(self.local_files_only, bool):
            raise ValueError(f"local_files_only={self.local_files_only!r} must be True or False")

    @property
    def newest(self) -> Hub:
        """The same, for another model than the one whose revision is named."""
        return replace(self, revision=None)

    def fetch(self, hub_id: str) -> Path:
        """The directory with the files of a model, fetched as far as they are not there.

        Args:
            hub_id: ``owner/name``.

        Raises:
            ModelNotFoundError: It was not had; the message says why.
        """
        try:
            return Path(
                snapshot_download(
                    hub_id,
                    revision=self.revision,
                    token=self.token,
                    cache_dir=self.cache_dir,
                    local_files_only=self.local_files_only,
                    allow_patterns=[f"*{ending}" for ending in MODEL_FILES],
                    ignore_patterns=["*/*"],  # exports to other formats live in subfolders
                )
            )
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            version = f" in revision {self.revision!r}" if self.revision else ""
            raise ModelNotFoundError(
                f"model={hub_id!r}: there is no directory of that name here, and it was not had{version} from the "
                f"hub or its cache ({reason}). Check the name; for a private model pass token= or log in with "
                f"'hf auth login'; offline, pass a local directory"
            ) from error


def _is_token(token: object) -> bool:
    # Others would be shown in full by the error of the library that sends them.
    return isinstance(token, str) and token != "" and token.isascii() and token.isprintable() and " " not in token
