"""Judgements come as ids, in the layouts of test collections."""

import json
from pathlib import Path

import pytest

from grating_core.cli.options import InputOptions
from grating_core.cli.qrels import judged_candidates
from tests.core.cli.conftest import grating

TEXTS = {f"d{number}": f"w{number} w{number % 5} w{number % 3}" for number in range(30)}
QUERIES = {f"q{number}": f"w{number} w{number % 5}" for number in range(25)}
HEADED = "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td3\t0\nq2\td2\t1\nq99\td1\t1\nq2\td99\t1\n"
TREC = "q1 0 d1 2\n\nq1 0 d3 0\nq2 0 d2 1\n"


def collection(place: Path, qrels: str, id_field: str = "_id") -> tuple[Path, Path, Path]:
    for name, texts in {"corpus": TEXTS, "queries": QUERIES}.items():
        lines = [json.dumps({id_field: id, "text": text}) for id, text in texts.items()]
        (place / f"{name}.jsonl").write_text("\n".join(lines))
    (place / "qrels.tsv").write_text(qrels)
    return place / "corpus.jsonl", place / "queries.jsonl", place / "qrels.tsv"


@pytest.mark.parametrize("qrels", [HEADED, TREC])
@pytest.mark.parametrize(("id_field", "named"), [("_id", None), ("id", None), ("doi", "doi")])
def test_candidates_of_judged_queries(tmp_path: Path, qrels: str, id_field: str, named: str | None) -> None:
    files = collection(tmp_path, qrels, id_field)
    found = list(judged_candidates(*files, InputOptions(), named, 8))
    assert len(found) == 16
    relevant = {(query, text) for query, text, is_relevant in found if is_relevant}
    assert relevant == {(QUERIES["q1"], TEXTS["d1"]), (QUERIES["q2"], TEXTS["d2"])}


@pytest.mark.parametrize(
    ("qrels", "named", "told"),
    [
        (HEADED + "q1\td1\n", None, "line 7"),
        (TREC, "doi", "without doi"),
        ("x\ty\t1\n", None, "names no query"),
        ("q1\td1\t0\n", None, "with a relevant document"),
    ],
)
def test_what_cannot_be_judged_is_said(tmp_path: Path, qrels: str, named: str | None, told: str) -> None:
    files = collection(tmp_path, qrels)
    with pytest.raises(ValueError, match=told):
        list(judged_candidates(*files, InputOptions(), named, 8))


def test_calibrating_fits_probabilities_as_well(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRATING_CACHE", str(tmp_path / "cache"))
    corpus, queries, qrels = collection(tmp_path, HEADED)
    asked = ("calibrate", str(tiny_bert), "--corpus", str(corpus), "--queries", str(queries))
    small = ("--candidates", "8", "--requests", "20", "--device", "cpu", "--dtype", "float32")
    refused = grating(*asked, "--qrels", str(qrels), *small)
    assert refused.exit_code == 2
    assert "2 relevant texts and 14 others" in " ".join(refused.stderr.split())
    assert not list(tmp_path.glob("cache/lenses/*"))
    unpaired = grating(*asked, "--qrels", str(qrels), "--qrels", str(qrels), *small)
    assert unpaired.exit_code == 2
    assert "2 files of qrels" in " ".join(unpaired.stderr.split())
