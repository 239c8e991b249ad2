"""The ``grating`` command: one module a subject, put together in :mod:`grating_core.cli.commands`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and end the process with its status.

    Args:
        arguments: What follows the command's name; None for those of the process.
    """
    from grating_core.cli.commands import app

    app(args=sys.argv[1:] if arguments is None else list(arguments), prog_name="grating")


def __getattr__(name: str) -> Any:
    # The application imports typer and rich, which main does where it can tell what went wrong.
    if name == "app":
        from grating_core.cli.commands import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
