"""The command grating simulate, run in this process: one of its own takes seconds to import what it needs."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from grating_core.cli.commands import app
from tests.core.columns.conftest import TEXT


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return str(tmp_path / "text.txt")


def simulate(model: Path, **changed: str) -> Result:
    settings = {"memory_budget": "1GB", "machine": "nvme", "dtype": "float32"}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in (settings | changed).items()]
    return CliRunner().invoke(app, ["simulate", str(model), *options])


def test_ways_are_compared_at_every_density(decoder_directory: Path, text: str, tmp_path: Path) -> None:
    settings = {"tokens": "64", "json": "", "figure": str(tmp_path / "ways.png")}
    arguments = [f"--{name}={value}" if value else f"--{name}" for name, value in settings.items()]
    arguments += [
        "--text",
        text,
        "--memory-budget",
        "1GB",
        "--machine",
        "nvme",
        "--activations",
        str(tmp_path / "kept"),
    ]
    arguments += ["--mlp-density", "0.7", "--mlp-density", "0.5", "--dtype", "float32"]
    done = CliRunner().invoke(app, ["simulate", str(decoder_directory), *arguments])
    assert done.exit_code == 0, done.stderr
    points = json.loads(done.stdout)["points"]
    ways = ["dense streaming", "DIP", "cache-aware DIP", "DIP", "cache-aware DIP"]
    assert [point["estimate"]["way"] for point in points] == ways
    assert [point["density"] for point in points] == [1, 0.7, 0.7, 0.5, 0.5]
    assert all(point["perplexity"] > 1 and point["estimate"]["tokens_per_second"] > 0 for point in points)
    assert (tmp_path / "ways.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "kept").is_file()


def test_a_machine_described_by_hand_is_the_one_of_that_name(
    decoder_directory: Path, text: str, tmp_path: Path
) -> None:
    same = {"text": text, "activations": str(tmp_path / "kept"), "tokens": "30"}
    named = simulate(decoder_directory, **same)
    numbers = {"disk_bandwidth": "3.5GB/s", "disk_reads": "140000", "memory_bandwidth": "30GB/s"}
    by_hand = simulate(decoder_directory, **same, **numbers, machine="phone")
    assert named.exit_code == 0, named.stderr
    rows = [[line.split()[-3:] for line in done.stdout.splitlines()[1:]] for done in (named, by_hand)]
    assert len(rows[0]) > 8
    assert [row[1:] for row in rows[0]] == [row[1:] for row in rows[1]]  # speeds differ by the latency of a read


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"memory_budget": "half"}, "'half'"),
        ({"memory_budget": "1kB"}, "memory_budget=1,000 bytes is too small"),
        ({"bits": "3"}, "bits=3"),
        ({"kv_bits": "4"}, "kv_bits=4"),
        ({"max_length": "9000000"}, "max_length=9000000"),
        ({"machine": "toaster"}, "machine='toaster'"),
        ({"disk_reads": "5"}, "--memory-bandwidth together"),
        (
            {"disk_reads": "5", "disk_bandwidth": "fast", "memory_bandwidth": "1GB/s"},
            "disk_bandwidth='fast'",
        ),
        ({"mlp_density": "1.5"}, "mlp_density=1.5"),
        ({"inputs_preference": "0"}, "inputs_preference=0.0"),
        ({"tokens": "9000"}, "too few"),
        ({"dtype": "int3"}, "--dtype"),
        ({"shape": "/no/such/place"}, "/no/such/place"),
        ({"text": "/no/such/file"}, "/no/such/file"),
    ],
)
def test_bad_input_is_told_in_a_sentence(
    decoder_directory: Path, text: str, tmp_path: Path, changed: dict[str, str], told: str
) -> None:
    done = simulate(decoder_directory, **({"text": text, "activations": str(tmp_path / "kept")} | changed))
    assert done.exit_code == 2
    assert told in " ".join(done.stderr.split())
    assert not (tmp_path / "kept").exists()
