"""What comes out of a rerank: records, JSON Lines, thresholds; and the JSON of other commands."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from grating_core import Reranker
from grating_core.files.places import cache_directory
from grating_core.models.placement import thread_advice
from tests.core.cli.conftest import DOCUMENTS, QUERY, grating

RECORDS = [{"id": f"doc-{n}", "title": f"T{n}", "text": text, "n": [n]} for n, text in enumerate(DOCUMENTS)]
ENTRY = ["rank", "id", "index", "score", "text", "probability", "estimated", "highlights", "record"]


@pytest.fixture
def stored(tmp_path: Path) -> str:
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(map(json.dumps, RECORDS)), encoding="utf-8")
    return str(path)


def ranked(*arguments: str, stdin: str = "") -> Any:
    done = grating("rerank", "-q", QUERY, *arguments, stdin=stdin)
    assert done.exit_code == 0, done.stderr
    return done


def test_the_schema_of_json_is_the_one_of_the_docs(stored: str) -> None:
    found = json.loads(ranked("-i", stored, "-k", "2", "--json").stdout)
    page = (Path(__file__).parents[3] / "docs" / "cli.md").read_text(encoding="utf-8")
    whole, entry = page.split("prints one object:")[1].split("prints a line for each document of the ranking:")

    def documented(section: str) -> set[str]:
        rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
        return {name.strip().strip("`") for row in rows for name in row.split(",")}

    assert set(found) == documented(whole)
    assert set(found["ranking"][0]) == documented(entry.split("`explain`")[0]) == set(ENTRY)


def test_records_come_back_whole_with_their_ids(stored: str) -> None:
    found = json.loads(ranked("-i", stored, "-k", "2", "--json").stdout)["ranking"]
    assert [(entry["rank"], entry["id"]) for entry in found] == [(1, "doc-1"), (2, "doc-2")]
    assert [entry["record"] for entry in found] == [RECORDS[1], RECORDS[2]]
    lines = ranked("-i", stored, "-k", "2", "--format", "jsonl", "--id-field", "title").stdout.splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["T1", "T2"]
    assert "doc-1" in ranked("-i", stored, "-k", "2").stdout
    plain = json.loads(ranked("-i", "-", "-k", "1", "--json", stdin="\n".join(DOCUMENTS)).stdout)["ranking"]
    assert (plain[0]["id"], plain[0]["record"]) == (None, None)
    refused = grating("rerank", "-q", QUERY, "-i", stored, "--id-field", "isbn")
    assert refused.exit_code == 2
    assert "'isbn'" in refused.stderr


def test_a_threshold_is_a_probability_unless_raw_scores_are_asked_for(stored: str, bundled: Reranker) -> None:
    scores = bundled.score([(QUERY, text) for text in DOCUMENTS])
    best, second, _ = sorted(scores, reverse=True)
    middle = (best + second) / 2
    asked = ("-i", stored, "--format", "jsonl", "--dtype", "float32", "--score-threshold")
    for threshold in ((str(bundled.probability(middle)),), (str(middle), "--raw-scores")):
        (kept,) = [json.loads(line) for line in ranked(*asked, *threshold).stdout.splitlines()]
        assert kept["index"] == 1
        assert kept["probability"] == bundled.probability(kept["score"])
    nothing = ranked(*asked, "1")
    assert nothing.stdout == ""
    assert f"the best has a score of {best:.3f}" in " ".join(nothing.stderr.split())
    refused = grating("rerank", "-q", QUERY, "-i", stored, "--score-threshold", "1", "--scores", "estimated")
    assert refused.exit_code == 2
    assert "--score-threshold" in refused.stderr


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--pruning", "none"], "--pruning"),
        (["--dtype", "bf16"], "--dtype"),
        (["-k", "0"], "--top-k"),
        (["--device", "tpu"], "--device"),
        (["--memory-budget", "lots"], "--memory-budget"),
        (["--target", "1.5"], "--target"),
        (["--score-threshold", "nan"], "--score-threshold"),
        (["--score-threshold", "-3.5"], "--score-threshold"),
        (["--score-threshold", "-inf"], "--score-threshold"),
        (["--max-length", "0"], "--max-length"),
        (["--format", "xml"], "--format"),
        (["-q", " "], "--query"),
    ],
)
def test_what_an_option_cannot_be_is_told_by_its_name_before_anything_is_read(
    options: list[str], named: str
) -> None:
    done = grating("rerank", "-q", QUERY, "-i", "/no/such/file", *options)
    assert done.exit_code == 2
    assert named in done.stderr
    assert "/no/such" not in done.stderr


def test_every_command_has_short_help_with_examples_and_choices() -> None:
    for command in (
        "rerank",
        "explain",
        "select",
        "generate",
        "bench",
        "plan",
        "calibrate",
        "simulate",
        "distill",
    ):
        shown = grating(command, "-h").stdout
        assert "Examples:" in shown, command
        assert f"grating {command}" in shown.split("Examples:")[1], command
    shown = grating("rerank", "-h").stdout
    assert "auto|cluster|off" in shown
    assert all(f"─ {panel} ─" in shown for panel in ("Input", "Output", "Model", "Pruning", "Memory", "Hub"))
    assert grating("--version").stdout.startswith("grating ")
    assert "--install-completion" in grating("-h").stdout


def test_models_in_a_narrow_terminal_have_whole_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_bert: Path
) -> None:
    name = "an-organisation-with-a-name/" + "a-reranker-whose-name-is-longer-than-the-terminal-is-wide-" * 2
    snapshot = tmp_path / f"models--{name.replace('/', '--')}" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40, encoding="utf-8")
    shutil.copytree(tiny_bert, snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")
    shown = grating("models")
    assert shown.exit_code == 0, shown.stderr
    assert "bundled:ms-marco-minilm-l12" in shown.stdout
    assert "ModernBertForSequenceClassification" in shown.stdout
    found = json.loads(grating("models", "--json").stdout)
    assert {"name", "kind", "path", "architecture", "layers", "bytes"} == set(found["models"][0])
    assert [model["name"] for model in found["models"] if model["kind"] == "hub cache"] == [name]
    assert found["supported"]


def test_doctor_tells_brackets_and_what_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Reranker.from_pretrained("bundled:ms-marco-minilm-l12").close()
    there = json.loads(grating("doctor", "--json").stdout)
    assert there["bundled_model"].startswith("converted, in ")
    assert there["cache"] == str(cache_directory())
    assert there["packages"]["torch"]
    assert there["thread_advice"] == thread_advice()
    assert (there["kernels"] is None) == bool(there["kernels_reason"])
    monkeypatch.setenv("GRATING_CACHE", str(tmp_path))
    monkeypatch.setattr("grating_core.models.bundled.PACKAGE", "no-such-package")
    monkeypatch.setattr("grating_core.models.placement.thread_advice", lambda: "set something")
    shown = " ".join(grating("doctor").stdout.split())
    assert "pip install grating-core[demo]" in shown
    assert "processors; set something" in shown
    assert f"kernels {there['kernels'] or 'none. '}" in shown


def test_plan_as_json() -> None:
    done = grating("plan", "bundled:ms-marco-minilm-l12", "--memory-budget", "110MB", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["budget"] == 110_000_000
    assert found["total"] == sum(found["parts"].values()) <= found["budget"]
    assert found["request"]["candidates"] == 20


def test_the_cache_is_listed_and_cleared_by_kind_and_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRATING_CACHE", str(tmp_path))
    assert grating("cache", "list").stdout.startswith("0 things")
    for folder in ("columns", "activations"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "one").write_bytes(b"12345")
    found = json.loads(grating("cache", "list", "--json").stdout)["contents"]
    assert [(one["kind"], one["size"]) for one in found] == [("columns", 5), ("activations", 5)]
    assert json.loads(grating("cache", "list", "--older-than", "1d", "--json").stdout)["contents"] == []
    declined = grating("cache", "clear", stdin="n\n")
    assert (declined.exit_code, (tmp_path / "columns" / "one").exists()) == (1, True)
    assert grating("cache", "clear", "--kind", "columns", "--yes").exit_code == 0
    assert not (tmp_path / "columns" / "one").exists()
    assert grating("cache", "clear", stdin="y\n").exit_code == 0
    assert not (tmp_path / "activations" / "one").exists()
    for wrong in (["--kind", "shoes"], ["--older-than", "soon"]):
        assert grating("cache", "clear", *wrong).exit_code == 2


def test_a_deadline_ends_with_the_first_documents_and_says_so(stored: str) -> None:
    found = json.loads(ranked("-i", stored, "--format", "json", "--deadline", "0.000001").stdout)
    assert found["cut_short"]
    assert [one["index"] for one in found["ranking"]] == list(range(len(DOCUMENTS)))
    assert all(one["estimated"] for one in found["ranking"])
    assert "cut short by the deadline" in " ".join(ranked("-i", stored, "--deadline", "0.000001").stdout.split())
    refused = grating("rerank", "-q", QUERY, "-i", stored, "--deadline", "0")
    assert refused.exit_code == 2
    assert "--deadline" in refused.stderr
