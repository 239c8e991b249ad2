"""The grating command as a process: its streams, signals and imports."""

import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import grating_core.cli.main

GRATING = [sys.executable, "-m", "grating_core"]
ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="streams and signals of POSIX")


@pytest.fixture
def cache(tmp_path: Path) -> dict[str, str]:
    return os.environ | {"GRATING_CACHE": str(tmp_path)}


def shell(command: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    words = " ".join(f"'{word}'" for word in GRATING)
    script = command.replace("grating", words)
    return subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        stdin=subprocess.DEVNULL,
    )


def test_the_script_of_the_package_is_the_command() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"grating": "grating_core.cli.main:main"}
    with pytest.raises(SystemExit) as end:
        grating_core.cli.main.main(["--version"])
    assert end.value.code == 0


def test_help_imports_nothing_that_takes_long() -> None:
    slow = {"torch", "numpy", "sklearn", "transformers", "asyncio", "tqdm", "psutil"}
    look = f"import sys, grating_core.cli.commands; print({slow} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("command", "status", "told"),
    [
        ("grating cache list >&-", 2, "Error: standard output cannot be written: Bad file descriptor\n"),
        ("grating rerank -q q -i - <&-", 2, "Error: standard input cannot be read: Bad file descriptor\n"),
        ("grating cache list 2>&-", 0, ""),
        ("grating rerank -q q -i /no/such 2>&-", 2, ""),
        ("grating cache list | true; exit ${PIPESTATUS[0]}", 141, ""),
    ],
)
def test_closed_streams_are_a_sentence_and_a_status(
    command: str, status: int, told: str, cache: dict[str, str]
) -> None:
    done = shell(command, cache)
    assert (done.returncode, done.stderr) == (status, told)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("command", ["cache list", "--help"])
def test_a_full_disk_behind_standard_output_is_told(command: str, cache: dict[str, str]) -> None:
    done = shell(f"grating {command} > /dev/full", cache)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: standard output")
    assert done.stderr.endswith("No space left on device\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("module", ["grating_core.cli.options", "torch._C"])
def test_an_interrupt_while_importing_ends_with_a_sentence(module: str, cache: dict[str, str]) -> None:
    command = [sys.executable, "-X", "importtime", *GRATING[1:], "doctor"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=cache,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # jobs in the background ignore it
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line.rstrip().endswith(f" {module}"):  # it has just been imported
            process.send_signal(signal.SIGINT)
            break
    rest, _ = process.stderr.read(), process.communicate()
    said = [line for line in rest.splitlines() if not line.startswith("import time:")]
    assert process.returncode == 130
    assert said == ["Stopped."]
