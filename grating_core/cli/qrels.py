"""Judgements come as ids: lines of a query, a document and a grade, as test collections have them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from grating_core.cli.inputs import Record, read_records
from grating_core.cli.options import InputOptions

_IDS = ("_id", "id")


def judged_candidates(
    corpus: Path, queries: Path, qrels: Path, how_stored: InputOptions, id_field: str | None, candidates: int
) -> Iterator[tuple[str, str, bool]]:
    """Yield the candidates of each judged query as triples of query, text, and whether the text is relevant.

    Candidates are the documents that share most words with a query, as calibration has them. One that is not in
    the judgements is not relevant.

    Args:
        corpus: The file of documents, with ids.
        queries: The file of queries, with ids.
        qrels: The file of judgements.
        how_stored: How the first two are stored.
        id_field: The field of the ids; None for _id, or id.
        candidates: Number of candidates of each query.

    Raises:
        ValueError: A file has no ids, or nothing in the judgements is known.
    """
    documents, asked = (_by_id(path, how_stored, id_field) for path in (corpus, queries))
    relevant: dict[str, set[str]] = defaultdict(set)
    for query, document, grade in _lines(qrels):
        if query in asked:
            found = relevant[asked[query]]
            if grade > 0 and document in documents:
                found.add(documents[document])
    if not any(relevant.values()):
        raise ValueError(f"{qrels} names no query of {queries} with a relevant document of {corpus}")
    from grating_core.lens.requests import make_requests

    texts = list(documents.values())
    for request in make_requests(texts, list(relevant), candidates=candidates, count=len(relevant), fewest=1):
        yield from ((request.query, text, text in relevant[request.query]) for text in request.documents)


def _by_id(path: Path, how_stored: InputOptions, id_field: str | None) -> dict[str, str]:
    """Return the texts of a file by their ids."""
    records = read_records(str(path), format=how_stored.input_format, field=how_stored.field)
    return {_id(record, path, (id_field,) if id_field else _IDS): record.text for record in records}


def _id(record: Record, path: Path, names: Sequence[str]) -> str:
    for name in names:
        if (value := (record.fields or {}).get(name)) is not None:
            return str(value)
    raise ValueError(f"{path} has a record without {' or '.join(names)}, by which qrels name it: use --id-field")


def _lines(path: Path) -> Iterator[tuple[str, str, float]]:
    """Yield query, document and grade of each line of three columns, or of TREC's four, without a header."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        columns = line.split("\t") if "\t" in line else line.split()
        if not columns:
            continue
        with suppress(ValueError):
            if len(columns) in (3, 4):
                yield columns[0], columns[-2], float(columns[-1])
                continue
        if number > 1:
            raise ValueError(f"{path}, line {number}: {line!r} is no query, document and grade")
