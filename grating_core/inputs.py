"""Documents from a file or standard input: JSON Lines, CSV, one per line, or all of it as one."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

Format = Literal["auto", "jsonl", "csv", "lines", "text"]

_BY_SUFFIX = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv"}


def read_documents(
    source: str, *, format: Format = "auto", field: str = "text", plain: Literal["lines", "text"] = "lines"
) -> list[str]:
    """Read the documents to rerank.

    Args:
        source: A file's path, or ``-`` for standard input. UTF-8.
        format: ``"jsonl"``: one JSON object a line; ``"csv"``: with a header; ``"lines"``: a document a line;
            ``"text"``: all of it is one document. ``"auto"`` goes by the file's ending and, where that says
            nothing, takes text whose first line is a JSON object for JSON Lines. Empty lines are passed over.
        field: The field of the JSON object, or the column of the CSV, that holds the text.
        plain: What ``"auto"`` takes for the format of any other text.

    Raises:
        ValueError: The input is not what the format says; the message names the line.
        OSError: The file cannot be read.
    """
    data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8 text (byte {error.start}); convert it first") from error
    chosen = _guess(source, text, plain) if format == "auto" else format
    return _READERS[chosen](text, field)


def _guess(source: str, text: str, plain: str) -> str:
    if (suffix := Path(source).suffix.lower()) in _BY_SUFFIX:
        return _BY_SUFFIX[suffix]
    return "jsonl" if text.lstrip().startswith("{") else plain


def _numbered_lines(text: str) -> Iterable[tuple[int, str]]:
    # Split at line feeds only: str.splitlines would also cut at separators that occur inside texts.
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def _read_jsonl(text: str, field: str) -> list[str]:
    documents = []
    for number, line in _numbered_lines(text):
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} is not JSON: {error}") from error
        if not isinstance(entry, dict) or not isinstance(entry.get(field), str):
            raise ValueError(f"line {number} has no text in the field {field!r}; name another one with --field")
        documents.append(entry[field])
    return documents


def _read_csv(text: str, field: str) -> list[str]:
    csv.field_size_limit(max(len(text), 1))
    rows = csv.DictReader(io.StringIO(text, newline=""))
    columns = rows.fieldnames or []
    if field not in columns:
        raise ValueError(f"the CSV has no column {field!r}, it has {list(columns)}; name one with --field")
    return [row[field] or "" for row in rows]


def _read_lines(text: str, field: str) -> list[str]:
    return [line.rstrip("\r") for _, line in _numbered_lines(text)]


_READERS: dict[str, Callable[[str, str], list[str]]] = {
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "lines": _read_lines,
    "text": lambda text, field: [text],
}
