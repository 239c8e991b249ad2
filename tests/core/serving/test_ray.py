"""Ray on this machine, with two processors: nothing is lost when one of two processes is killed."""

import os
import re
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from time import monotonic, sleep
from typing import Any

import httpx
import psutil
import pytest
import torch

from grating_core import Request, Reranker
from grating_core.serving.batches import BatchReranker
from grating_core.serving.settings import ServeSettings
from grating_core.settings import RerankSettings
from tests.core.conftest import BUNDLED
from tests.core.serving.conftest import DOCUMENTS, ORDER, QUERY

ray = pytest.importorskip("ray")
serve = pytest.importorskip("ray.serve")

from grating_core.serving.ray import ActorReranker, application, follow_cpus  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]

PAGE = Path(__file__).parents[3] / "docs" / "ray.md"
_BATCHES, DATA, SERVE, _SPARK, DASK = re.findall(r"```py\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
TOPICS = ("fruit", "rain", "music", "law", "winter", "bread", "glass", "rivers", "stars", "taxes", "horses", "tea")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster of this machine. At its end, all of its processes have ended."""
    before = set(psutil.Process().children(recursive=True))
    with (
        tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as directory,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("RAY_TMPDIR", directory)  # short, as sockets need it
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        ray.init(
            num_cpus=2,
            object_store_memory=100 << 20,
            include_dashboard=False,
            runtime_env={"env_vars": environment},
        )
        processes = set(psutil.Process().children(recursive=True)) - before
        try:
            yield
        finally:
            processes |= set(psutil.Process().children(recursive=True)) - before
            serve.shutdown()
            ray.shutdown()
        assert psutil.wait_procs(processes, timeout=30)[1] == []


@pytest.fixture(scope="module")
def address(cluster: None) -> str:
    """The address of Ray Serve in the cluster."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    return f"http://127.0.0.1:{port}"


def processes_of(name: str) -> list[psutil.Process]:
    """Return the actors of a class in this test's own cluster."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if name in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:  # it has just ended
            continue
    return found


def test_an_actor_computes_with_as_many_threads_as_it_has_processors(cluster: None) -> None:
    class Counting:
        def __init__(self) -> None:
            follow_cpus()

        def threads(self) -> int:
            return torch.get_num_threads()

    for cpus in (1, 2):
        actor = ray.remote(num_cpus=cpus)(Counting).remote()
        assert ray.get(actor.threads.remote()) == cpus
        ray.kill(actor)


def test_ray_data_loses_nothing_when_an_actor_is_killed(cluster: None) -> None:
    random, count, settings = Random(), 2000, {"device": "cpu", "dtype": "float32"}
    rows = [
        {"id": number, "query": random.choice(TOPICS), "documents": random.sample(TOPICS, 2)}
        for number in range(count)
    ]
    ranked = ray.data.from_items(rows, override_num_blocks=40).map_batches(
        ActorReranker,
        fn_constructor_args=(BUNDLED,),
        fn_constructor_kwargs={"top_k": 1, **settings},
        batch_format="pandas",
        batch_size=50,
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=2),
    )
    found: dict[int, Any] = {}
    killed = None
    for row in ranked.iter_rows():
        found[row["id"]] = row
        if killed is None and len(found) >= count // 2:
            killed = processes_of("ActorReranker")[0]
            killed.kill()
    assert killed is not None
    assert not killed.is_running()
    assert sorted(found) == list(range(count))
    with Reranker.from_pretrained(BUNDLED, **settings) as library:
        wanted = library.rerank_many(Request(row["query"], row["documents"], 1) for row in rows)
    for number, result in enumerate(wanted):
        assert list(found[number]["ranking"]) == [best.index for best in result.ranking]
        assert found[number]["scores"] == pytest.approx([best.score for best in result.ranking], abs=1e-4)


def test_ray_serve_answers_every_request_when_a_replica_is_killed(address: str) -> None:
    settings = RerankSettings(model=BUNDLED, device="cpu", dtype="float32")
    serve.run(application(settings, ServeSettings(api_key="key"), num_replicas=2))
    body = {"query": QUERY, "documents": DOCUMENTS * 4}
    count, halfway = 120, threading.Semaphore(0)

    def ask(_: int) -> httpx.Response:
        try:
            return client.post("/v2/rerank", json=body)
        finally:
            halfway.release()

    with (
        httpx.Client(base_url=address, headers={"Authorization": "Bearer key"}, timeout=120) as client,
        ThreadPoolExecutor(8) as callers,
    ):
        asked = [callers.submit(ask, number) for number in range(count)]
        for _ in range(count // 3):
            halfway.acquire()
        killed = processes_of(":Replica")[0]
        killed.kill()
        answers = [one.result() for one in asked]
        assert not killed.is_running()
        assert client.get("/health").json() == {"status": "ok"}
        assert client.post("/rerank", json={"query": QUERY}).json()["message"] == "documents is missing"
        assert client.post("/rerank", content=b" " * 5_000_000).status_code == 413
        assert httpx.post(f"{address}/rerank", json=body, timeout=60).status_code == 401
    for answer in answers:
        if answer.status_code == 200:
            places = [result["index"] for result in answer.json()["results"]]
            assert [place % 3 for place in places] == [place for place in ORDER for _ in range(4)]
        else:
            assert answer.status_code == 503
            assert "come again later" in answer.json()["message"]
    assert len(answers) == count
    serve.delete("default")


def test_ray_serve_starts_another_replica_when_tokens_wait(address: str) -> None:
    settings = RerankSettings(model=BUNDLED, device="cpu", dtype="float32")
    scaling = {"min_replicas": 1, "max_replicas": 2, "upscale_delay_s": 0}
    scaling |= {"metrics_interval_s": 1, "look_back_period_s": 2}
    serve.run(application(settings, ServeSettings(queue_tokens=2000), autoscaling_config=scaling))
    enough = threading.Event()

    def ask() -> set[int]:
        statuses = set()
        with httpx.Client(base_url=address, timeout=120) as client:
            while not enough.is_set():
                answer = client.post("/rerank", json={"query": QUERY, "documents": DOCUMENTS * 8})
                statuses.add(answer.status_code)
        return statuses

    with ThreadPoolExecutor(6) as callers:
        asked = [callers.submit(ask) for _ in range(6)]
        try:
            end = monotonic() + 90
            while len(processes_of(":Replica")) < 2 and monotonic() < end:
                sleep(1)
            assert len(processes_of(":Replica")) == 2
        finally:
            enough.set()
    assert set().union(*(one.result() for one in asked)) <= {200, 429}
    serve.delete("default")


def test_the_example_of_ray_data_runs(cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ray.data.from_items([{"query": QUERY, "documents": DOCUMENTS}] * 30).write_parquet(str(tmp_path / "requests"))
    code = DATA.replace('"requests"', repr(str(tmp_path / "requests")))
    exec(compile(code.replace('"ranked"', repr(str(tmp_path / "ranked"))), PAGE.name, "exec"), {})
    rows = ray.data.read_parquet(str(tmp_path / "ranked")).take_all()
    assert [list(row["ranking"]) for row in rows] == [ORDER] * 30


def test_the_example_of_ray_serve_runs(address: str) -> None:
    namespace: dict[str, Any] = {}
    exec(compile(SERVE, PAGE.name, "exec"), namespace)
    serve.run(namespace["app"])
    answer = httpx.post(f"{address}/rerank", json={"query": QUERY, "documents": DOCUMENTS}, timeout=60).json()
    assert [result["index"] for result in answer["results"]] == ORDER
    serve.delete("default")


def test_the_example_of_dask_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("dask.dataframe")
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"query": [QUERY] * 5, "documents": [DOCUMENTS] * 5})
    namespace: dict[str, Any] = {"rank": BatchReranker(BUNDLED), "frame": frame}
    exec(compile(DASK, PAGE.name, "exec"), namespace)
    assert namespace["ranked"].compute()["ranking"].tolist() == [ORDER] * 5
