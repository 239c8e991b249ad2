"""The README as the package index shows it, and the links beside it: both follow from the repository's address."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_RELATIVE_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)")


class Readme(MetadataHookInterface):
    """Writes the metadata ``readme`` and ``urls``."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Fill in what pyproject.toml calls dynamic.

        Args:
            metadata: The project's metadata, changed in place.
        """
        repository = self.config["repository"]
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": with_links(text, repository)}
        metadata["urls"] = {"Repository": repository} if repository else {}


def with_links(text: str, repository: str) -> str:
    """Make links that are relative to the repository work elsewhere.

    Args:
        text: Markdown.
        repository: The repository's address; empty while it has none, and then such links become plain text.
    """

    def link(found: re.Match[str]) -> str:
        image, label, target = found.groups()
        if not repository:
            return label
        return f"{image}[{label}]({repository}/{'raw' if image else 'blob'}/main/{target})"

    return _RELATIVE_LINK.sub(link, text)
