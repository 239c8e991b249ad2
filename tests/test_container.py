"""The server's image: what it is made of, what it may do, and what it calls."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import httpx
import pytest
import yaml
from typer.main import get_command

from grating_core.cli.commands import app
from grating_core.serving.settings import ServeSettings
from tests.core.serving.conftest import DOCUMENTS, ORDER, QUERY, real_model, serving

ROOT = Path(__file__).parent.parent
VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile, each with its arguments."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\s*\\\n\s*", " ", text).splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines if line)]


def last_stage() -> list[tuple[str, str]]:
    found = instructions()
    begins = max(number for number, (word, _) in enumerate(found) if word == "FROM")
    return found[begins:]


def only(word: str) -> str:
    """The arguments of an instruction that the last stage has once."""
    (found,) = (rest for one, rest in last_stage() if one == word)
    return found


def service() -> dict[str, Any]:
    composed = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    assert composed["volumes"].keys() == {"cache"}
    (found,) = composed["services"].values()
    return found


def understood(words: list[str]) -> dict[str, Any]:
    """The options of a call of the command, which it refuses if it does not know them."""
    program, command, *rest = words
    assert program == "grating"
    return get_command(app).commands[command].make_context(command, rest).params  # type: ignore[attr-defined]


def sources() -> list[str]:
    copied = [shlex.split(rest) for word, rest in instructions() if word == "COPY"]
    return [source for words in copied if "--from=build" not in words for source in words[:-1]]


def test_what_is_copied_is_there_and_is_all_that_docker_is_given() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    given = [line[1:] for line in lines if line.startswith("!")]
    assert lines[1] == "*"
    assert sorted(given) == sorted(sources())
    assert [source for source in sources() if not (ROOT / source).exists()] == []
    left_out = [line for line in lines[2:] if not line.startswith("!")]
    built = ("grating_core/__pycache__", "kernels/build", "kernels/grating_kernels/grating_kernels.so")
    assert all(any(fnmatch(path, pattern) for pattern in left_out) for path in built)


def test_the_image_has_no_compiler_and_no_rights() -> None:
    commands = " ".join(rest for word, rest in last_stage() if word == "RUN")
    assert "g++" not in commands
    assert "apt" not in commands
    uid = int(only("USER"))  # a number, so that an orchestrator sees that it is not root
    assert uid > 1000
    assert f"--uid {uid}" in commands


def test_the_command_of_the_image_is_understood() -> None:
    options = understood(json.loads(only("ENTRYPOINT")) + json.loads(only("CMD")))
    assert options["host"] == "0.0.0.0"
    assert options["port"] == int(only("EXPOSE"))


def test_the_composed_service_fits_the_image() -> None:
    composed = service()
    command = [VARIABLE.sub(r"\2", word) for word in composed["command"]]
    options = understood(json.loads(only("ENTRYPOINT")) + command)
    assert options["name"] == "reranker"
    assert command[0] == json.loads(only("CMD"))[0]
    (port,) = composed["ports"]
    assert VARIABLE.sub(r"\2", port) == f"127.0.0.1:8080:{only('EXPOSE')}"
    (volume,) = composed["volumes"]
    assert volume == f"cache:{only('VOLUME')}"
    assert int(composed["stop_grace_period"].removesuffix("s")) > ServeSettings().drain
    assert composed["read_only"]
    assert composed["cap_drop"] == ["ALL"]


def test_the_variables_are_those_of_the_page() -> None:
    page = (ROOT / "docs/docker.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([A-Z_]+)` \| (\S.*?) \|", page, re.MULTILINE)
    text = (ROOT / "compose.yaml").read_text(encoding="utf-8")
    defaults = {name: f"`{default}`" for name, default in VARIABLE.findall(text)}
    assert {name: default for name, default in rows if name in defaults} == defaults
    assert {name for name, _ in rows} == {*defaults, *service()["environment"]}


def healthy(address: str) -> bool:
    """Whether the image's question for the server's health says so, at another address."""
    program, *rest = json.loads(only("HEALTHCHECK").partition(" CMD ")[2])
    assert program == "python"
    call = [sys.executable, *(word.replace("http://127.0.0.1:8080", address) for word in rest)]
    return subprocess.run(call, capture_output=True, timeout=30).returncode == 0


def test_the_question_for_health_tells_a_server_from_none() -> None:
    with serving(real_model()) as address:
        assert healthy(address)
    assert not healthy(address)


@contextmanager
def container(image: str) -> Iterator[str]:
    """A container of an image, and its address."""
    run = ["docker", "run", "--detach", "--rm", "--init", "--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL"]
    name = subprocess.run(
        [*run, "--volume", "/cache", "--publish", "127.0.0.1::8080", image],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    try:
        told = subprocess.run(["docker", "port", name, "8080"], check=True, capture_output=True, text=True).stdout
        yield f"http://{told.splitlines()[0]}"
    finally:
        subprocess.run(["docker", "stop", name], check=True, capture_output=True)


@pytest.mark.slow
def test_the_image_builds_and_ranks() -> None:
    if shutil.which("docker") is None or subprocess.run(["docker", "info"], capture_output=True).returncode != 0:
        pytest.skip("there is no Docker")
    subprocess.run(["docker", "build", "--quiet", "--tag", "grating-test", ROOT], check=True)
    with container("grating-test") as address:
        end = monotonic() + 120
        while True:
            try:
                httpx.get(f"{address}/health").raise_for_status()
                break
            except httpx.HTTPError:
                assert monotonic() < end
                sleep(1)
        answer = httpx.post(f"{address}/rerank", json={"query": QUERY, "documents": DOCUMENTS}, timeout=60).json()
    assert [result["index"] for result in answer["results"]] == ORDER
