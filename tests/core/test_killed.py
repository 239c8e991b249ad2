"""What is killed at any moment is done the next time, and nothing is left of the first time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.core.conftest import save_model
from tests.core.models.test_decoders import save_decoder

TIMES = 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "made"),
    [
        ("convert", "models/ms-marco-minilm-l12-"),
        ("calibrate", "lenses/"),
        ("columns", "columns/"),
        ("distill", "adapter/adapter_"),
    ],
)
def test_twenty_random_moments(job: str, made: str, tmp_path: Path) -> None:
    if job in ("columns", "distill"):
        model = save_decoder(tmp_path / "model", "llama")
    else:
        model = save_model(tmp_path / "model", "bert")
    (tmp_path / "place").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "tests.core.killed", job, str(model), str(tmp_path / "place"), str(TIMES)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        stdout=subprocess.PIPE, text=True, timeout=900, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    print(job, {name: found[name] for name in ("seconds", "killed", "half")})
    assert all(name.startswith(made) and "/." not in name for name in found["files"])
    assert found["killed"] == TIMES
    assert found["wrong"] == []
