"""The command as people run it: a process of its own, that a signal ends."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from time import sleep

import httpx

from tests.core.conftest import BUNDLED
from tests.core.serving.conftest import DOCUMENTS, ORDER, QUERY


@contextmanager
def command(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process of ``grating serve`` on a free port, and its address."""
    arguments = [sys.executable, "-m", "grating_core", "serve", BUNDLED, "--port", "0", *options]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            first = process.stderr.readline()
            address = re.search(r"at (http://127\.0\.0\.1:\d+);", first)
            assert address, first + process.stderr.read()
            yield process, address[1]
        finally:
            process.kill()


def test_the_command_serves_models_by_name_until_it_is_told_to_end() -> None:
    with command("--name", "first", "--also", f"second={BUNDLED}") as (process, address):
        names = [model["id"] for model in httpx.get(f"{address}/v1/models", timeout=60).json()["data"]]
        assert names == ["first", "second"]
        body = {"query": QUERY, "documents": DOCUMENTS}
        for name in names:
            answer = httpx.post(f"{address}/rerank", json=body | {"model": name}, timeout=60).json()
            assert (answer["model"], [result["index"] for result in answer["results"]]) == (name, ORDER)
        with ThreadPoolExecutor() as pool:
            long = {"query": QUERY, "documents": [" ".join(DOCUMENTS) * 8] * 20, "grating": {"pruning": "off"}}
            accepted = pool.submit(httpx.post, f"{address}/rerank", json=long, timeout=60)
            sleep(0.3)
            assert not accepted.done()
            process.send_signal(signal.SIGTERM)
            assert len(accepted.result().json()["results"]) == 20
        _, logged = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM  # as the signal's sender expects
    lines = [json.loads(line) for line in logged.splitlines()]
    requests = [line for line in lines if line["event"] == "request"]
    assert [line["status"] for line in requests] == [200] * 4
    assert {"time", "level", "id", "method", "path", "seconds", "model", "documents", "tokens"} <= requests[
        1
    ].keys()
    assert "Berlin" not in logged


def test_an_address_that_is_taken_is_told_in_a_sentence() -> None:
    with httpx.Client(), command() as (_, address):
        port = address.rpartition(":")[2]
        arguments = [sys.executable, "-m", "grating_core", "serve", BUNDLED, "--port", port]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"127.0.0.1:{port} cannot be listened at" in done.stderr
    assert "Traceback" not in done.stderr
