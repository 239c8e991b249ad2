"""The page on which people try the server: one file of HTML, which the browser lets talk to this server alone."""

from __future__ import annotations

import re
from base64 import b64encode
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from typing import Self

_STYLES = re.compile(r"<style>(.*?)</style>", re.DOTALL)
_SCRIPTS = re.compile(r"<script>(.*?)</script>", re.DOTALL)


@dataclass(frozen=True)
class Page:
    """The page, and what a browser is told beside it.

    Attributes:
        html: The page.
        headers: The headers of the answer. They allow only the style and the script in the page, by their hashes,
            and keep a script from turning a text into markup.
    """

    html: str
    headers: dict[str, str]

    @classmethod
    def load(cls) -> Self:
        """Read the page from the package."""
        html = (files("grating_core.serving") / "page.html").read_text(encoding="utf-8")
        policy = (
            "default-src 'none'",
            f"style-src {_hashes(_STYLES.findall(html))}",
            f"script-src {_hashes(_SCRIPTS.findall(html))}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
        )
        return cls(
            html,
            {
                "Content-Security-Policy": "; ".join(policy),
                "Cache-Control": "no-cache",
                "Referrer-Policy": "no-referrer",
                "X-Content-Type-Options": "nosniff",
            },
        )


def _hashes(blocks: list[str]) -> str:
    return " ".join(f"'sha256-{b64encode(sha256(block.encode()).digest()).decode()}'" for block in blocks)
