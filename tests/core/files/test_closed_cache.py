"""Users who may not write, or not even look, where grating keeps things; and those who have no home at all."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.core.conftest import save_model
from tests.core.faults import small_disk

pytestmark = pytest.mark.slow

NOBODY = 65534  # nobody, as most systems number it
UNKNOWN = 54321  # a user of whom no file says anything
# Who it is, the environment, and what the message has to name.
CASES: dict[str, tuple[int, dict[str, str | None], str]] = {
    "a closed home": (NOBODY, {"HOME": "{place}/closed", "GRATING_CACHE": None}, "{place}/closed/.cache/grating"),
    "a closed cache": (NOBODY, {"GRATING_CACHE": "{place}/closed"}, "{place}/closed"),
    "no home": (UNKNOWN, {"HOME": None, "GRATING_CACHE": None}, "this user has no home directory"),
    "a file": (NOBODY, {"GRATING_CACHE": "{place}/file"}, "{place}/file"),
    "in a file": (0, {"GRATING_CACHE": "{place}/file/cache"}, "{place}/file/cache"),
    "a relative path": (NOBODY, {"GRATING_CACHE": "here"}, "{place}/work/here"),
    "another's home": (NOBODY, {"GRATING_CACHE": "~root/grating"}, "/root/grating"),
    "the home of nobody": (NOBODY, {"GRATING_CACHE": "~no-such-user/grating"}, "~no-such-user/grating"),
    "a read-only disk": (0, {"GRATING_CACHE": "{place}/disk"}, "{place}/disk"),
}


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """Where other users may look, with a model, a closed directory and a file."""
    if os.geteuid() != 0:
        pytest.skip("only root may become another user")
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o755)
    save_model(directory / "model", "bert")
    for file in (directory / "model").iterdir():
        file.chmod(0o644)
    (directory / "closed").mkdir(mode=0o700)
    (directory / "file").write_bytes(b"")
    (directory / "work").mkdir()
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def seen(place: Path) -> dict[str, Any]:
    cases = {
        case: (
            user,
            {"XDG_CACHE_HOME": None}
            | {name: value and value.format(place=place) for name, value in given.items()},
        )
        for case, (user, given, _) in CASES.items()
    }
    with small_disk(place / "disk", 1 << 20, read_only=True):
        done = subprocess.run(
            [sys.executable, "-m", "tests.core.other_users", str(place), json.dumps(cases)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "GRATING_CACHE": str(place / "good")},
            stdout=subprocess.PIPE, text=True, timeout=300, check=True,
        )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_model_that_needs_no_cache_ranks_and_what_is_not_kept_is_said_once(
    seen: dict[str, Any], place: Path, case: str
) -> None:
    found, named = seen[case]["use"], CASES[case][2].format(place=place)
    assert found["status"] == 0, found["stderr"]
    first, second = found["stdout"].splitlines()
    assert first == second
    assert first.endswith("] 1")  # what is learnt is used, as long as the process lives
    warnings = [line for line in found["stderr"].splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 1, found["stderr"]
    assert named in warnings[0]
    assert "GRATING_CACHE" in warnings[0]
    assert "Traceback" not in found["stderr"]
    assert not list((place / "work").iterdir())


@pytest.mark.parametrize("case", CASES)
def test_doctor_says_what_is_wrong(seen: dict[str, Any], place: Path, case: str) -> None:
    found, named = seen[case]["doctor"], CASES[case][2].format(place=place)
    assert found["status"] == 0, found["stderr"]
    (row,) = [line for line in found["stdout"].splitlines() if line.startswith("grating's cache")]
    assert named in row
    assert "GRATING_CACHE" in row
    assert "bundled:ms-marco-minilm-l12" in found["stdout"]  # and the command models goes on


@pytest.mark.parametrize("case", CASES)
def test_a_model_that_has_to_be_converted_says_where_it_cannot_be(
    seen: dict[str, Any], place: Path, case: str
) -> None:
    found, named = seen[case]["convert"], CASES[case][2].format(place=place)
    assert found["status"] == 0, found["stderr"]
    assert found["stdout"].startswith("StorageError ")
    assert named in found["stdout"]
    assert "GRATING_CACHE" in found["stdout"]
