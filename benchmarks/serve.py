"""Requests a second of the HTTP server under load, beside the bare library and another server on the same model.

    .venv/bin/python -m benchmarks.serve --data DIRECTORY
    .venv/bin/python -m benchmarks.serve --data DIRECTORY --peer infinity --peer-python .venv-infinity/bin/python

The directory holds the collection locomo, the memory of an agent: a request has 20 candidates of about 60 tokens,
found by BM25, and asks for the best 5. The bare library answers the same requests one after another in one
process. Then 64 connections ask the server in a closed loop: each asks again as soon as it has its answer. At last
requests come at twice the rate that the server kept up with, whatever it answers.

Systems run one after the other. The client is a process of its own on the same cores; the table names its load.
A peer runs in a virtual environment of its own, because it wants other versions of packages.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, perf_counter, sleep
from typing import Annotated, Any
from urllib.request import urlopen

import numpy as np
import psutil
import typer

from benchmarks.collections import Request, load_requests
from benchmarks.report import RESULTS, Output, Row, write_result
from benchmarks.visitors import load_client
from benchmarks.worker import Ask, Facts, Ready, System, Worker, loaded, progress
from grating_core import Reranker

MODEL = "bundled:ms-marco-minilm-l12"
TOP_K = 5
QUERIES = 200
_WARM_UP = 5.0  # seconds
_PATIENCE = 120.0  # seconds in which a server must have started


def load_bare(ready: Ready, *, requests: Sequence[Request], model: str) -> Ask:
    """Load the library. It answers requests one after another for so many seconds."""
    ready()
    reranker = Reranker.from_pretrained(model, device="cpu")

    def ask(seconds: float) -> Facts:
        taken: list[float] = []
        ends = perf_counter() + seconds
        while (started := perf_counter()) < ends:
            request = requests[len(taken) % len(requests)]
            reranker.rerank(request.query, request.documents, TOP_K)
            taken.append(perf_counter() - started)
        return {"accepted": taken, "statuses": {200: len(taken)}, "health": [], "client_seconds": 0.0}

    return ask


def grating_command(directory: Path, port: int) -> list[str]:
    """Return the command of this project's server."""
    options = ["--name", "model", "--device", "cpu", "--port", str(port)]
    return [sys.executable, "-m", "grating_core", "serve", MODEL, *options]


def infinity_command(python: Path, directory: Path, port: int) -> list[str]:
    """Return the command of infinity-emb's server for a model in a directory, in bfloat16 as grating takes it."""
    options = ["--engine", "torch", "--device", "cpu", "--dtype", "bfloat16", "--no-bettertransformer"]
    where = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "model"]
    return [str(python.with_name("infinity_emb")), "v2", "--model-id", str(directory), *where, *options]


@contextmanager
def serving(command: Sequence[str], port: int) -> Iterator[psutil.Process]:
    """Start a server, wait until it answers, and end it."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            ends = monotonic() + _PATIENCE
            while not _answers(port):
                if process.poll() is not None or monotonic() > ends:
                    raise RuntimeError(f"no server came of: {' '.join(command)}")
                sleep(0.2)
            yield psutil.Process(process.pid)
        finally:
            process.terminate()


def _answers(port: int) -> bool:
    try:
        with urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def free_port() -> int:
    """Return a port of this machine that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def version_of(python: Path) -> str:
    """Return the versions of infinity-emb and torch that are installed for a Python."""
    asking = "from importlib.metadata import version as v; print(v('infinity-emb'), 'with torch', v('torch'))"
    return subprocess.run([python, "-c", asking], check=True, capture_output=True, text=True).stdout.strip()


def bodies_of(requests: Sequence[Request]) -> list[bytes]:
    """Return the requests as Cohere's clients send them, without the texts in the answer."""
    about = {"model": "model", "top_n": TOP_K, "return_documents": False}
    return [
        json.dumps({**about, "query": request.query, "documents": request.documents}).encode()
        for request in requests
    ]


def row(
    system: str, load: str, facts: Facts, seconds: float, memory: tuple[float, float] | None = None
) -> dict[str, Any]:
    """Reduce what the client saw to a row.

    Args:
        system: Who answered.
        load: How it was asked.
        facts: What the client saw.
        seconds: How long it asked, to the last answer.
        memory: The server's MB before and after.
    """
    statuses = {int(status): count for status, count in facts["statuses"].items()}
    asked, good, refused = sum(statuses.values()), statuses.get(200, 0), statuses.get(429, 0)

    def percentile(name: str, share: float) -> float | None:
        return 1000 * float(np.percentile(facts[name], share)) if facts[name] else None

    before, after = memory or (None, None)
    return {
        "system": system,
        "load": load,
        "requests": asked,
        "requests_per_second": good / seconds,
        "times": None,
        "p50_ms": percentile("accepted", 50),
        "p95_ms": percentile("accepted", 95),
        "p99_ms": percentile("accepted", 99),
        "refused_share": refused / asked,
        "errors": asked - good - refused,
        "memory_before_mb": before,
        "memory_after_mb": after,
        "health_p50_ms": percentile("health", 50),
        "health_p99_ms": percentile("health", 99),
        "health_max_ms": percentile("health", 100),
        "client_cores": facts["client_seconds"] / seconds,
    }


def ask_server(
    name: str,
    command: Sequence[str],
    port: int,
    client: Worker,
    bodies: Sequence[bytes],
    path: str,
    *,
    seconds: float,
    connections: int,
) -> list[Row]:
    """Start a server and put both loads to it: the closed loop, then twice the rate that it kept up with."""
    question = {"port": port, "path": path, "bodies": bodies, "connections": connections}
    with serving(command, port) as process:
        client.ask({**question, "seconds": _WARM_UP})

        def asked(load: str, **more: Any) -> Row:
            before = process.memory_info().rss / 1e6
            with progress.status(f"{name}: {load}"):
                answer = client.ask({**question, **more})
            return row(name, load, answer.facts, answer.seconds, (before, process.memory_info().rss / 1e6))

        closed = asked(f"{connections} connections", seconds=seconds)
        if not closed["requests_per_second"]:
            raise RuntimeError(f"{name} answered no request with status 200")
        rate = 2 * closed["requests_per_second"]
        return [closed, asked("twice the capacity", seconds=min(seconds, 60.0), rate=rate)]


def main(
    data: Annotated[Path, typer.Option(help="The directory with the collection locomo.")],
    seconds: Annotated[float, typer.Option(help="How long the closed loop asks each server.")] = 180.0,
    connections: Annotated[int, typer.Option(help="Connections of the closed loop.")] = 64,
    candidates: Annotated[int, typer.Option(help="Candidates of a query.")] = 20,
    peer: Annotated[str | None, typer.Option(help="Another server to ask: infinity.")] = None,
    peer_python: Annotated[Path, typer.Option(help="The Python that the peer is installed for.")] = Path(
        ".venv-infinity/bin/python"
    ),
    output: Output = RESULTS,
) -> None:
    """Measure, and write the file of results ``serve``."""
    requests = load_requests(data / "locomo", candidates=candidates, queries=QUERIES)
    bodies = bodies_of(requests)
    port = free_port()
    with loaded([System("bare", load_bare, {"requests": requests, "model": MODEL})]) as (worker,):
        worker.ask(_WARM_UP)
        with progress.status("bare library: one after another"):
            answer = worker.ask(min(seconds, 60.0))
    rows = [row("bare library", "one after another", answer.facts, answer.seconds)]
    with Reranker.from_pretrained(MODEL) as reranker:
        directory = reranker.model_path
    servers = [("grating serve", grating_command(directory, port), "/v1/rerank")]
    if peer == "infinity":
        servers.append(("infinity-emb", infinity_command(peer_python, directory, port), "/rerank"))
    with loaded([System("client", load_client)]) as (client,):
        for name, command, path in servers:
            rows += ask_server(name, command, port, client, bodies, path, seconds=seconds, connections=connections)
    bare = rows[0]["requests_per_second"]
    for one in rows:
        one["times"] = one["requests_per_second"] / bare
    setting: dict[str, Any] = {"model": MODEL, "candidates": candidates, "top_k": TOP_K, "seconds": seconds}
    setting |= {"connections": connections, "peer": None if peer is None else version_of(peer_python)}
    write_result(output, "serve", rows, rounds=1, setting=setting)


if __name__ == "__main__":
    typer.run(main)
