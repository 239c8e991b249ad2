"""The process of the command begins and ends here, whatever happens to it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from grating_core.cli.status import BROKEN_PIPE, INTERRUPTED


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and end the process with its status: 0, 2 for what was refused, 130, 141.

    Nothing is imported before this is called that takes long: who interrupts it gets a sentence as well.

    Args:
        arguments: What follows the command's name; None for those of the process.
    """
    try:
        _open_streams()
        status = _run(sys.argv[1:] if arguments is None else list(arguments))
        if not status:
            sys.stdout.flush()
    except KeyboardInterrupt:
        _say("Stopped.")
        status = INTERRUPTED
    except BrokenPipeError:
        status = BROKEN_PIPE
    except OSError as error:
        reason = error.strerror or str(error)
        _say(f"Error: {reason}" if "standard output" in reason else f"Error: standard output: {reason}")
        status = 2
    _forget_unwritten()
    sys.exit(status)


def _run(arguments: list[str]) -> int:
    from grating_core.cli.commands import app

    try:
        app(args=arguments, prog_name="grating")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    return 0


def _open_streams() -> None:
    """Put something into the place of standard streams that are closed, before a file of ours gets their numbers.

    Reading or writing there fails then, as it should; what goes to standard error is lost.
    """
    for number, (name, flags, mode) in enumerate(
        (("stdin", os.O_WRONLY, "r"), ("stdout", os.O_RDONLY, "w"), ("stderr", os.O_WRONLY, "w"))
    ):
        if getattr(sys, name) is None:
            with suppress(OSError):
                os.close(number)
            setattr(sys, name, open(os.open(os.devnull, flags), mode, encoding="utf-8"))  # noqa: PTH123, SIM115


def _say(message: str) -> None:
    with suppress(OSError):
        print(message, file=sys.stderr, flush=True)


def _forget_unwritten() -> None:
    """Let what could not be written go nowhere: the interpreter would try again at its end, and complain."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
