"""What the documentation says of speed, memory and quality was measured, and can be measured again."""

import re
import shlex
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from transformers import AutoTokenizer

from benchmarks import memory, peers, serve, visitors
from benchmarks.collections import Request
from benchmarks.recipes import EncoderRecipe
from benchmarks.render import DOCS, FIGURES, PAGES, page_names, provenance, render_page, wrong_figures
from benchmarks.report import RESULTS, ROOT, Result, read_result, read_results, write_result
from benchmarks.worker import System
from grating_core.kernels.choice import kernels
from tests.core.conftest import save_model
from tests.core.parity import load
from tests.core.serving.conftest import serving

BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))
COMMAND = re.compile(r"python -m (benchmarks\.\w+)(.*)")
DOCUMENTS = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def check_command(command: str) -> None:
    """Raise an error unless the command names a benchmark and options that it has."""
    found = COMMAND.fullmatch(command)
    assert found, command
    app = typer.Typer()
    app.command()(import_module(found[1]).main)
    typer.main.get_command(app).make_context(found[1], shlex.split(found[2], comments=True))


@pytest.fixture(scope="module")
def results() -> dict[str, Result]:
    return read_results()


@pytest.mark.parametrize("name", page_names())
def test_rendering_again_gives_the_page(name: str, results: dict[str, Result]) -> None:
    assert render_page(name, results) == (DOCS / "benchmarks" / name).read_text(encoding="utf-8")


def test_no_page_is_without_a_template() -> None:
    assert sorted(path.name for path in (DOCS / "benchmarks").iterdir()) == page_names()


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_a_file_of_results_says_how_to_measure_again(path: Path) -> None:
    result = read_result(path)  # refuses a file with other fields
    assert result.name == path.stem
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", result.date)
    assert re.fullmatch(r"[0-9a-f]{12}", result.commit)
    assert result.hardware.keys() >= {"processor", "cores", "threads", "instructions", "gflops", "memory_gb"}
    assert all(result.versions[name] for name in ("python", "torch", "transformers", "numpy"))
    assert result.rounds >= 1
    assert result.rows
    assert {frozenset(row) for row in result.rows} == {frozenset(result.rows[0])}
    check_command(result.command)


def test_every_result_has_its_place(results: dict[str, Result]) -> None:
    templates = "".join((PAGES / name).read_text(encoding="utf-8") for name in page_names())
    # By name, or in a loop over names and titles.
    shown = set(re.findall(r'(?:results\[|in \[\(|, \()"([\w-]+)"', templates)) | {
        source for source, _ in FIGURES.values()
    }
    assert results.keys() <= shown


@pytest.mark.parametrize("path", [*BENCHMARKS, *DOCUMENTS, ROOT / "Makefile"], ids=lambda path: path.stem)
def test_the_commands_that_are_written_somewhere_are_right(path: Path) -> None:
    for found in COMMAND.finditer(path.read_text(encoding="utf-8")):
        check_command(found[0])


def test_a_command_that_is_not_right_is_noticed() -> None:
    with pytest.raises(ModuleNotFoundError):
        check_command("python -m benchmarks.hurry --data data")
    with pytest.raises(Exception, match="No such option: --queries"):
        check_command("python -m benchmarks.latency --data data --queries 3")
    with pytest.raises(Exception, match="valid integer"):
        check_command("python -m benchmarks.latency --data data --rounds many")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_a_document_quotes_what_was_measured(path: Path, results: dict[str, Result]) -> None:
    text = path.read_text(encoding="utf-8")
    assert wrong_figures(text, results) == []


def result_of(rows: list[dict[str, object]], **setting: object) -> Result:
    return Result("some", "2026-01-01", "0" * 12, False, {}, {}, "", 1, dict(setting), rows)


def test_a_figure_that_nobody_measured_is_noticed() -> None:
    row = {"collection": "mean", "policy": "lens", "value": 0.98, "scores": "exact", "top_k": 5}
    measured = result_of([{**row, "compute_share": 0.641, "agreement": 0.9834}], candidates=20)
    line = "the best 5 of 20 <!-- figure: pruning --> | {} %, `target=0.9` | 98.3 % ([more](9.md))"
    assert wrong_figures(line.format(64), {"pruning": measured}) == []
    assert wrong_figures(line.format(63), {"pruning": measured}) == ["63: " + line.format(63)]
    assert len(wrong_figures(line.format(64), {"pruning": replace(measured, setting={"candidates": 60})})) == 1


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    rows = [{"system": "grating", "seconds": 0.123456, "budget_mb": None}, {"system": "é", "seconds": 12345.6}]
    write_result(tmp_path / "new", "seconds-of-this", rows, rounds=3, setting={"k": (1, 5)}, packages=["no-such"])
    found = read_result(tmp_path / "new" / "seconds-of-this.json")
    assert found.rows == [rows[0] | {"seconds": 0.1235}, rows[1] | {"seconds": 12346}]
    assert (found.name, found.rounds, found.setting) == ("seconds-of-this", 3, {"k": [1, 5]})
    assert found.versions["no-such"] is None
    assert found.hardware["gflops"]["float32"] > 0
    assert found.hardware["kernels"] == (kernels().level or f"torch ({kernels().reason.removesuffix('.')})")
    assert f"kernels: {found.hardware['kernels']};" in provenance(found)
    with pytest.raises(ValueError, match="JSON"):  # a figure that is none
        write_result(tmp_path, "seconds-of-this", [{"seconds": float("nan")}], rounds=3)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_system_in_a_process_of_its_own_is_watched() -> None:
    directory = memory.find_or_write("bundled:ms-marco-minilm-l12")
    settings = {"directory": directory, "max_length": 128, "memory_budget": 100_000_000}
    questions = memory.make_questions(directory, 2, candidates=5, tokens=60)
    row = memory.measure(System("grating", memory.load_grating, settings), directory, questions)
    assert 5 < row["mean_mb"] <= row["peak_mb"] <= 100  # the budget
    assert row["read_mb"] > 10
    assert [seconds for seconds, _ in row["curve"]] == sorted(seconds for seconds, _ in row["curve"])
    assert 0 < row["seconds"] < row["curve"][-1][0]
    with pytest.raises(RuntimeError, match=r"(?s)nonsense is failed, not ready.*BudgetError"):
        memory.measure(
            System("nonsense", memory.load_grating, settings | {"memory_budget": 1}), directory, questions
        )


@pytest.mark.parametrize("rate", [None, 200.0])
def test_a_client_counts_what_a_server_answers_and_refuses(tmp_path: Path, rate: float | None) -> None:
    bodies = serve.bodies_of(
        [Request("w1", ["w2", "w3 w4", "w5"], [], {}), Request("w1", ["w2 " * 40] * 4, [], {})]
    )
    with serving(load(save_model(tmp_path, "bert")), name="model", queue_tokens=60) as address:
        asked = {"port": int(address.rpartition(":")[2]), "path": "/v1/rerank", "seconds": 0.5, "connections": 4}
        facts = visitors.load_client(lambda: None)({**asked, "bodies": [*bodies, b"{}"], "rate": rate})
    row = serve.row("grating", "some", facts, 0.5, (100.0, 101.0))
    assert facts["statuses"].keys() == {200, 422, 429}
    assert (row["requests"], row["errors"]) == (sum(facts["statuses"].values()), facts["statuses"][422])
    assert row["requests_per_second"] == 2 * facts["statuses"][200] == 2 * len(facts["accepted"])
    assert 0 < row["refused_share"] < 1
    assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"]
    assert 0 < row["health_p50_ms"] <= row["health_max_ms"]


def test_lanes_and_batches_of_a_runtime_score_as_one_pair_at_a_time() -> None:
    directory = memory.find_or_write("bundled:ms-marco-minilm-l12")
    recipe = EncoderRecipe(directory, None)
    model = recipe.architecture.from_pretrained(directory).eval()
    texts = ["seas", "a text " * 90, "", "the sea is blue " * 7, "blue", "why " * 600]
    request = Request("why is the sea blue?", texts, [], {})

    def open_lanes(files: Path, lanes: int, threads: int) -> list[peers.Run]:
        def run(batch: peers.Batch) -> peers.Scores:
            with torch.inference_mode():
                return model(**{name: torch.from_numpy(ids) for name, ids in batch.items()}).logits[:, 0].numpy()

        return [run] * lanes

    expected = recipe.scores(model, request.query, texts, 1).numpy()
    ways = peers.runtime_ways(AutoTokenizer.from_pretrained(directory), directory, open_lanes, threads=2)
    assert len(ways) == 2 * len(peers.BATCH_SIZES)
    for name, way in ways.items():
        np.testing.assert_allclose(way(request), expected, atol=1e-4, err_msg=name)
    quickest = peers.Quickest({"slow": lambda request: time.sleep(0.1), "quick": lambda request: expected})
    assert quickest.scores("some", request)[1] == "quick"
