"""Documents come from a file or standard input: JSON, JSON Lines, CSV, TSV, one a line, or all of it as one."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from json import JSONDecodeError
from pathlib import Path
from typing import Any, Literal

from grating_core.files.reading import parse_json

Format = Literal["auto", "jsonl", "json", "csv", "tsv", "lines", "text"]

MOST_BYTES = 1 << 30
"""The most bytes that are read of an input: one without an end would fill the memory."""

_BY_SUFFIX = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".tab": "tsv"}
_LIKE_AN_OBJECT = re.compile(r'\s*\{\s*["}]')
_LIKE_AN_ARRAY = re.compile(r'\s*\[\s*([{"]|\]\s*$)')


@dataclass(frozen=True)
class Record:
    """This is a document as it was stored.

    Attributes:
        text: What is judged.
        fields: The JSON object or CSV row that it is part of; None if there is nothing but text.
    """

    text: str
    fields: dict[str, Any] | None = None


def read_documents(
    source: str, *, format: Format = "auto", field: str = "text", plain: Literal["lines", "text"] = "lines"
) -> list[str]:
    """Return the texts of :func:`read_records`, which takes the same arguments and raises the same errors."""
    return [record.text for record in read_records(source, format=format, field=field, plain=plain)]


def read_records(
    source: str, *, format: Format = "auto", field: str = "text", plain: Literal["lines", "text"] = "lines"
) -> list[Record]:
    """Read documents.

    Args:
        source: A file's path, or ``-`` for standard input. UTF-8.
        format: ``"jsonl"``: a JSON object or string a line; ``"json"``: an array of them, or one object; ``"csv"``
            and ``"tsv"``: with a header; ``"lines"``: a document a line; ``"text"``: all of it is one document.
            ``"auto"`` goes by the file's ending and, where that says nothing, takes for JSON what begins as a JSON
            object, or as an array of objects or strings. Empty lines are passed over.
        field: The field of the JSON object, or the column of the table, that holds the text.
        plain: What ``"auto"`` takes for the format of any other text.

    Raises:
        ValueError: The input is not what the format says, a file is empty, or there is more of it than
            :data:`MOST_BYTES`; the message names file, line and column.
        OSError: The file cannot be read.
    """
    name = "standard input" if source == "-" else source
    data = _read_all(source, name)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text (byte {error.start}); convert it first") from error
    if source != "-" and not text.strip():
        raise ValueError(f"{name} is empty: there are no documents in it")
    chosen = _guess(source, text, plain) if format == "auto" else format
    return list(_READERS[chosen](text, field, name))


def _read_all(source: str, name: str) -> bytearray:
    """Read a file or standard input to its end, which may never come."""
    data = bytearray()
    try:
        with nullcontext(sys.stdin.buffer) if source == "-" else Path(source).open("rb") as stream:
            while block := stream.read(1 << 20):
                data += block
                if len(data) > MOST_BYTES:
                    raise ValueError(
                        f"{name} has more than {MOST_BYTES:,} bytes, or no end. Divide it into smaller files, or "
                        f"give the best candidates of a search"
                    )
    except OSError as error:
        if source == "-":
            raise OSError(f"standard input cannot be read: {error.strerror}") from error
        raise
    return data


def _guess(source: str, text: str, plain: str) -> str:
    suffix = Path(source).suffix.lower()
    if suffix in _BY_SUFFIX:
        return _BY_SUFFIX[suffix]
    if _LIKE_AN_OBJECT.match(text):
        # One object over several lines does not end on the first of them.
        return "jsonl" if _is_json(text.lstrip().split("\n", 1)[0]) or not _is_json(text) else "json"
    return "json" if suffix == ".json" or _LIKE_AN_ARRAY.match(text) else plain


def _is_json(text: str) -> bool:
    try:
        parse_json(text)
    except ValueError:
        return False
    return True


def _read_jsonl(text: str, field: str, name: str) -> Iterator[Record]:
    for number, line in _numbered_lines(text):
        yield _record(_parsed(line, name, number), field, f"{name}, line {number}")


def _read_json(text: str, field: str, name: str) -> Iterator[Record]:
    if not text.strip():
        return
    found = _parsed(text, name, 1)
    for number, entry in enumerate(found if isinstance(found, list) else [found]):
        yield _record(entry, field, f"{name}, entry {number}" if isinstance(found, list) else name)


def _parsed(text: str, name: str, first_line: int) -> Any:
    try:
        return parse_json(text)
    except JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(f"{name}, line {line}, column {error.colno}, is not JSON: {error.msg}") from error
    except ValueError as error:
        raise ValueError(f"{name}, line {first_line}: {error}") from error


def _record(entry: Any, field: str, place: str) -> Record:
    if isinstance(entry, str):
        return Record(entry)
    if not isinstance(entry, dict) or not isinstance(entry.get(field), str):
        has = f"; it has {', '.join(map(repr, list(entry)[:9]))}" if isinstance(entry, dict) else ""
        raise ValueError(f"{place}, has no text in the field {field!r}{has}. Name another one with --field")
    return Record(entry[field], entry)


def _read_table(text: str, field: str, name: str, *, delimiter: str) -> Iterator[Record]:
    _check_quotes(text, name, delimiter)
    csv.field_size_limit(max(len(text), 1))
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    columns = next(rows, [])
    if columns.count(field) != 1:
        times = f"{columns.count(field)} columns" if field in columns else "no column"
        raise ValueError(f"{name}, line 1, has {times} {field!r}, it has {columns}; name one with --field")
    place, line = columns.index(field), rows.line_num + 1
    try:
        for row in rows:
            if len(row) > len(columns):
                raise ValueError(
                    f"{name}, line {line}: the row has {len(row)} fields, the header only {len(columns)}. A text "
                    f"with a separator in it belongs in quotes"
                )
            if row:
                yield Record(row[place] if place < len(row) else "", dict(zip(columns, row, strict=False)))
            line = rows.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{name}, line {line}: {error}") from error


def _check_quotes(text: str, name: str, delimiter: str) -> None:
    """Refuse a field whose quotes do not enclose all of it, at the character where that shows."""
    for field in re.finditer(rf'(?:(?<=[{delimiter}\n\r])|\A)"(?:[^"]+|"")*(?P<closed>"|\Z)', text):
        if not field["closed"]:
            raise ValueError(f"{name}, {_place(text, field.start())}: this quote is never closed")
        if (after := text[field.end() : field.end() + 1]) and after not in f"{delimiter}\r\n":
            raise ValueError(
                f"{name}, {_place(text, field.end())}: {after!r} follows a closing quote. "
                f"A quote inside a quoted field is written twice"
            )


def _place(text: str, offset: int) -> str:
    return f"line {text.count(chr(10), 0, offset) + 1}, column {offset - text.rfind(chr(10), 0, offset)}"


def _read_lines(text: str, field: str, name: str) -> Iterator[Record]:
    return (Record(line.rstrip("\r")) for _, line in _numbered_lines(text))


def _read_text(text: str, field: str, name: str) -> Iterator[Record]:
    yield Record(text)


def _numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    # Split at line feeds only: str.splitlines would also cut at separators that occur inside texts.
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


_READERS: dict[str, Callable[[str, str, str], Iterator[Record]]] = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": partial(_read_table, delimiter=","),
    "tsv": partial(_read_table, delimiter="\t"),
    "lines": _read_lines,
    "text": _read_text,
}
