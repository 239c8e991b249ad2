"""The check of a device, on the CPU."""

import json
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from scripts import check_device
from tests.core.conftest import BUNDLED

app = typer.Typer()
app.command()(check_device.main)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize(
    ("arguments", "sentence"), [([], "has no GPU"), (["--device", "cuda"], "is not on this machine")]
)
def test_without_a_gpu_it_says_so(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "found.json")])
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_all_parts_run_on_a_cpu(tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    small = ["--candidates", "3", "--tokens", "20", "--rounds", "1", "--model", BUNDLED]
    result = CliRunner().invoke(app, ["--device", "cpu", "--output", str(output), *small])
    assert result.exit_code == 0, result.stderr
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found["failures"] == []
    model = found["models"][BUNDLED]
    assert model["parity"]["float32"]["largest_error"] <= 1e-4
    assert 0 <= model["streaming"]["hidden_share_of_reading"] <= 1
    assert model["streaming"]["scores_differ_by"] == 0  # on a CPU a budget changes nothing
    assert model["streaming"]["bytes_read"] > 0
    assert len(model["latency"]) == 7
    assert all(row["seconds"] > 0 for row in model["latency"])


def test_it_stops_when_its_time_is_over(tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    arguments = ["--device", "cpu", "--output", str(output), "--model", BUNDLED]
    result = CliRunner().invoke(app, [*arguments, "--seconds", "0"])
    assert result.exit_code == 0
    found = json.loads(output.read_text(encoding="utf-8"))["models"][BUNDLED]
    assert found == {part: {"skipped": "no time was left"} for part in ("parity", "streaming", "latency")}
