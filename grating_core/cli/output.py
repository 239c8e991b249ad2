"""This module writes results and messages, and shows in a terminal what others wrote."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text

_FILE_WIDTH = 120  # columns of a table that goes into a file

# What a terminal obeys or hides: control characters, marks that turn the direction of writing, characters without
# width, tags. A joiner is left where it joins (emoji, Persian, Hindi), a variation selector where it stands alone.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f"
    "\u2028-\u202e\u2060-\u206f\u3164\ud800-\udfff\ufeff\uffa0\ufff0-\ufffb"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
    "|(?<![^\x00-\x7f])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\x7f])"
    "|(?<=[\u200c\u200d\ufe00-\ufe0f])[\ufe00-\ufe0f]"
)


def visible(text: str) -> str:
    r"""Return a text as a terminal may have it: what the terminal would obey or hide is written as ``\x1b``."""
    return _HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text.replace("\r\n", "\n"))


class _PlainConsole(Console):
    """This console takes strings as text: no markup, no emoji by name, nothing that a terminal would obey."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(visible(text), **how)


err = _PlainConsole(stderr=True)


def forgive_encodings() -> None:
    """Let what the encoding of standard output or standard error lacks be written as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def write(text: str, path: Path | None = None) -> None:
    """Write a text as it is.

    Args:
        text: All of a result, or a part of it if it goes to standard output.
        path: The file that it becomes; None for standard output.

    Raises:
        OSError: It cannot be written; the message says where to. A file that cannot be replaced raises the
            ``StorageError`` of :func:`replacing`.
    """
    try:
        if path is None:
            sys.stdout.write(text)
            sys.stdout.flush()
            return
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno, f"standard output cannot be written: {error.strerror or error}") from error
    data = text.encode("utf-8", "backslashreplace")
    if is_stream(path):
        try:
            with path.open("ab") as file:  # what a shell has opened is not cut
                file.write(data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
    else:
        from grating_core.files.writing import replacing  # slow to import

        with replacing(path.resolve(), len(data)) as file:
            file.write(data)


def is_stream(path: Path) -> bool:
    """Return whether a path names no file that could be replaced: a device, a pipe, or what a shell has opened."""
    opened = re.fullmatch(r"/dev/(stdout|stderr)|(/dev|/proc/self)/fd/\d+", str(path)) is not None
    # os.path, unlike Path, takes a name that no file can have for one that is not there.
    there, ordinary = os.path.exists(path), os.path.isfile(path) or os.path.isdir(path)  # noqa: PTH110, PTH112, PTH113
    return opened or (there and not ordinary)


def write_text(text: str) -> None:
    """Write text that others wrote to standard output: as it is into a pipe, made visible in a terminal."""
    write(visible(text) if sys.stdout.isatty() else text)


def show(
    *renderables: RenderableType, path: Path | None = None, style: str | None = None, whole: bool = False
) -> None:
    """Write strings and tables.

    Args:
        renderables: The strings and tables, from top to bottom.
        path: The file that they become; None for standard output.
        style: The style of a line in a terminal.
        whole: Whether all columns are as wide as they need, even if the terminal is narrower.
    """

    def console(width: int | None) -> Console:
        colours = path is None and sys.stdout.isatty()
        return _PlainConsole(file=io.StringIO(), width=width, force_terminal=colours)

    printed = console(_FILE_WIDTH if path else None)
    if whole:
        printed = console(max(printed.width, *(console(10_000).measure(one).maximum for one in renderables)))
    for one in renderables:
        printed.print(one, style=style)
    write(str(printed.file.getvalue()), path)  # type: ignore[attr-defined]


def write_json(value: Any, path: Path | None = None) -> None:
    """Write a value as JSON, to a file or to standard output."""
    write(_as_json(value, path, indent=2) + "\n", path)


def write_json_lines(values: Iterable[Any], path: Path | None = None) -> None:
    """Write each value as a line of JSON, to a file or to standard output."""
    write("".join(_as_json(value, path, indent=None) + "\n" for value in values), path)


def _as_json(value: Any, path: Path | None, indent: int | None) -> str:
    encoding = "utf-8" if path is not None else getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text = json.dumps(value, ensure_ascii="utf" not in encoding.lower(), indent=indent)
    except RecursionError as error:
        raise ValueError("a record is nested too deeply to be written as JSON") from error
    # Of equal value: what would act on a terminal, or is no character at all, goes as JSON's own escape.
    return _HIDDEN.sub(lambda found: json.dumps(found[0])[1:-1], text)


def tell(message: str, style: str = "") -> None:
    """Write a sentence to standard error, if that is possible."""
    with suppress(OSError):
        err.print(message, style=style, soft_wrap=True)  # a path in it can be copied whole


def told(error: Exception) -> str:
    """Return what an error says, without the number that the system has for it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def tell_error(message: str) -> None:
    """Say on standard error why a command could not do what it was asked."""
    tell(f"Error: {message}", "red")
