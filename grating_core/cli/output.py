"""Where results and messages go."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console
from rich.text import Text

out = Console()
err = Console(stderr=True)


def print_json(value: dict[str, Any]) -> None:
    """Write a value to standard output."""
    json.dump(value, sys.stdout, ensure_ascii=False, indent=2)
    sys.stdout.write("\n")


def tell_error(message: str) -> None:
    """Say on standard error why a command could not do what it was asked."""
    err.print(Text(f"Error: {message}", style="red"))
