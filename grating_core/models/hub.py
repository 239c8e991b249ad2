"""This module says how a hub is asked for a model: which version, as which user, and where to keep it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from grating_core.files.places import expanded

MODEL_FILES = (".json", ".safetensors", ".txt", ".model", ".jinja")
_REVISION = re.compile(r"(?!/)(?!.*\.\.)[^\s~^:?*\[\\]+")  # names that git allows


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


def _is_token(token: object) -> bool:
    # The library that sends a token would show any other value in full in its error.
    return isinstance(token, str) and token != "" and token.isascii() and token.isprintable() and " " not in token
