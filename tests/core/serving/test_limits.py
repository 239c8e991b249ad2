"""What a server refuses, gives up and finishes. A policy that stands still holds requests where they are."""

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import httpx
import pytest

from grating_core import Route
from tests.core.parity import load
from tests.core.policies import StandsStill
from tests.core.serving.conftest import serving

BODY = {"query": "w1", "documents": ["w2 w3", "w4 w5"], "top_n": 1}


@contextmanager
def held(model: Path, **settings: Any) -> Iterator[tuple[StandsStill, httpx.Client]]:
    """A server whose requests with a top_n stand still after the first layer until the policy lets them go."""
    policy = StandsStill()
    try:
        with (
            serving(load(model, pruning=policy), **settings) as address,
            httpx.Client(base_url=address, timeout=30, limits=httpx.Limits(max_connections=None)) as client,
        ):
            yield policy, client
            policy.go.set()
    finally:
        policy.go.set()


def until(true: Any, seconds: float = 10.0) -> None:
    end = monotonic() + seconds
    while not true():
        assert monotonic() < end
        sleep(0.01)


def gauge(client: httpx.Client, name: str) -> float:
    """The value of a metric without labels but the model."""
    lines = client.get("/metrics").text.splitlines()
    return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{"))


@pytest.mark.parametrize("announced", [True, False])
def test_a_large_body_is_refused_whether_announced_or_not(tiny_bert: Path, announced: bool) -> None:
    content = b'{"query": "' + b"w" * 5000 + b'"}'
    with serving(load(tiny_bert), max_body=2000) as address:
        sent = content if announced else iter([content[:3000], content[3000:]])
        refused = httpx.post(f"{address}/rerank", content=sent)
        assert refused.status_code == 413
        assert "the body has more than 2000 bytes" in refused.json()["message"]
        assert httpx.post(f"{address}/rerank", json=BODY).status_code == 200


def test_bodies_that_are_read_at_a_time_are_bounded_in_bytes(tiny_bert: Path) -> None:
    """Sixteen of the largest size have room, whether their clients announced them or not."""
    part, connections = b'{"query": "' + b"w" * 1900, []
    with serving(load(tiny_bert), max_body=2000) as address:
        port = int(address.rpartition(":")[2])
        try:
            for _ in range(16):
                connections.append(socket.create_connection(("127.0.0.1", port)))
                connections[-1].sendall(b"POST /rerank HTTP/1.1\r\nHost: a\r\nContent-Length: 2000\r\n\r\n" + part)
            until(lambda: httpx.post(f"{address}/rerank", content=part.ljust(1990)).status_code == 429)
            refused = httpx.post(f"{address}/rerank", content=iter([part[:1000], part[1000:].ljust(990)]))
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert "too many large bodies" in refused.json()["message"]
            assert httpx.post(f"{address}/rerank", json=BODY).status_code == 200  # a small one has room
            assert httpx.get(f"{address}/health").status_code == 200
        finally:
            for connection in connections:
                connection.close()
        # Clients that leave make room.
        until(lambda: httpx.post(f"{address}/rerank", json=BODY | {"more": "w" * 1800}).status_code == 200)


@pytest.mark.parametrize("value", ["1,", "[],", '"a",', '"\\"",'])
def test_a_body_of_too_many_values_is_refused_while_others_are_answered(tiny_bert: Path, value: str) -> None:
    body = b'{"query": "w1", "more": [' + value.encode() * (3_900_000 // len(value)) + b'1], "documents": ["w2"]}'
    with serving(load(tiny_bert)) as address, ThreadPoolExecutor(2) as pool:
        refused = pool.submit(httpx.post, f"{address}/rerank", content=body, timeout=60)
        longest = 0.0
        while not refused.done():
            started = monotonic()
            assert httpx.get(f"{address}/health").status_code == 200
            longest = max(longest, monotonic() - started)
        assert (refused.result().status_code, "too many values" in refused.result().text) == (413, True)
        assert longest < 1


def test_a_large_body_of_texts_is_answered(tiny_bert: Path) -> None:
    documents = ['w2, "w3" \\ ' * 700] * 300
    with serving(load(tiny_bert)) as address:
        answer = httpx.post(f"{address}/rerank", json=BODY | {"documents": documents}, timeout=60)
        assert (answer.status_code, len(answer.json()["results"])) == (200, 1)


def test_too_many_documents_or_tokens_are_refused_by_the_name_of_the_field(tiny_bert: Path) -> None:
    with serving(load(tiny_bert), max_documents=5, max_tokens=100) as address:
        listed = httpx.post(f"{address}/score", json={"queries": ["w1"] * 6, "documents": ["w2"] * 6})
        assert (listed.status_code, "queries has 6 entries" in listed.text) == (413, True)
        for path, field in (("/rerank", "documents"), ("/rerank", "texts"), ("/score", "text_2")):
            asked = {"text_1" if field == "text_2" else "query": "w1"}
            many = httpx.post(address + path, json=asked | {field: ["w2"] * 6})
            long = httpx.post(address + path, json=asked | {field: ["w2 " * 60] * 2})
            assert (many.status_code, long.status_code) == (413, 413)
            assert f"{field} has 6 entries; this server takes 5" in many.text
            assert f"{field} and query have 128 tokens" in long.text
            assert httpx.post(address + path, json=asked | {field: ["w2"] * 5}).status_code == 200


def test_a_query_that_fills_the_window_is_refused(tiny_bert: Path) -> None:
    with serving(load(tiny_bert)) as address:
        refused = httpx.post(f"{address}/rerank", json=BODY | {"query": "w1 " * 100})
        assert refused.status_code == 422
        assert refused.json()["message"].startswith("query has 100 tokens, which leaves no room")


def test_an_unknown_model_is_refused_with_the_names_of_all(tiny_bert: Path) -> None:
    with serving(load(tiny_bert)) as address:
        refused = httpx.post(f"{address}/rerank", json=BODY | {"model": "other"})
        assert (refused.status_code, refused.json()["error"]["type"]) == (404, "not_found")
        assert "berlin" in refused.json()["message"]
        assert str(tiny_bert) not in refused.text


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is not JSON"),
        (b"{", "the body is not JSON"),
        (b"\xff\xfe", "the body is not JSON"),
        (b"[1]", "the body must be a JSON object"),
        (b'{"documents": []}', "query is missing"),
        (b'{"query": 5, "documents": []}', "query must be a valid string"),
        (b'{"query": "  ", "documents": []}', "query must not be blank"),
        (b'{"query": "w1"}', "documents is missing"),
        (b'{"query": "w1", "documents": "w2"}', "documents must be a valid list"),
        (b'{"query": "w1", "documents": ["w2", {"body": "w3"}]}', "documents[1] must be a string, or an object"),
        (b'{"query": "w1", "documents": [], "top_n": -1}', "top_n must be greater than or equal to 0"),
        (b'{"query": "w1", "documents": [], "grating": {"target": 1}}', "grating.target must be less than 1"),
        (b'{"query": "w1", "documents": [], "grating": {"goal": 1}}', "grating.goal is unknown"),
        (b'{"query": "w1", "documents": [], "grating": {"deadline_ms": 0}}', "grating.deadline_ms must be"),
    ],
)
def test_a_wrong_field_is_named(client: httpx.Client, body: bytes, message: str) -> None:
    refused = client.post("/rerank", content=body)
    assert refused.status_code == 422
    assert refused.json()["message"].startswith(message)
    assert refused.json()["error"] == {"message": refused.json()["message"], "type": "validation", "code": 422}


def test_unequal_lists_of_pairs_are_refused(client: httpx.Client) -> None:
    refused = client.post("/score", json={"text_1": ["a", "b"], "text_2": ["c", "d", "e"]})
    assert refused.status_code == 422
    assert refused.json()["message"] == "text_1 has 2 texts and text_2 has 3; give one, or as many"


def test_unknown_paths_and_methods_are_refused_as_json(client: httpx.Client) -> None:
    for answer, status in ((client.get("/nothing"), 404), (client.put("/rerank"), 405)):
        assert answer.status_code == answer.json()["error"]["code"] == status


def test_a_full_queue_answers_429_and_takes_requests_again_later(tiny_bert: Path) -> None:
    with held(tiny_bert, queue_tokens=20) as (policy, client), ThreadPoolExecutor() as pool:
        first = pool.submit(client.post, "/rerank", json=BODY)
        policy.reached.wait(10)
        refused = client.post("/rerank", json=BODY)
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) >= 1
        assert refused.json()["error"]["type"] == "overloaded"
        assert client.post("/rerank", json={"query": "w1", "texts": ["w2 w3", "w4"]}).json().keys() == {
            "error",
            "error_type",
        }
        policy.go.set()
        assert first.result().status_code == 200
        assert client.post("/rerank", json=BODY).status_code == 200


def test_long_texts_take_room_in_the_queue_however_little_is_read_of_them(tiny_bert: Path) -> None:
    with held(tiny_bert, queue_tokens=1000) as (policy, client), ThreadPoolExecutor() as pool:
        first = pool.submit(client.post, "/rerank", json=BODY)
        policy.reached.wait(10)
        refused = client.post("/rerank", json={"query": "w1", "documents": ["w2 " * 20_000]})
        assert refused.status_code == 429
        waiting = client.post("/rerank", json={"query": "w1", "documents": ["w2"], "grating": {"deadline_ms": 50}})
        assert waiting.status_code == 200
        assert waiting.headers["X-Cut-Short"] == "true"
        assert waiting.json()["grating"] | {"seconds": 0} == {
            "compute_share": 0, "cut_short": True, "estimated": [0], "seconds": 0, "tokens": 0, "truncated": []
        }  # fmt: skip
        assert gauge(client, "grating_cut_short_total") == 1
        policy.go.set()
        assert first.result().status_code == 200


def test_requests_that_wait_go_into_one_pass(tiny_bert: Path) -> None:
    with held(tiny_bert) as (policy, client), ThreadPoolExecutor(20) as pool:
        first = pool.submit(client.post, "/rerank", json=BODY)
        policy.reached.wait(10)
        others = [
            pool.submit(client.post, "/rerank", json={"query": f"w{i}", "documents": ["w2", "w3"]})
            for i in range(9)
        ]
        until(lambda: gauge(client, "grating_queue_requests") == 10)
        policy.go.set()
        traces = [future.result().json() for future in [first, *others]]
        assert all(len(trace["results"]) for trace in traces)
        # All nine have the seconds of one pass, which began when the first was over.
        waited = [trace["grating"]["seconds"] for trace in traces[1:]]
        assert max(waited) - min(waited) < max(waited)


def test_a_slice_without_end_ends_a_request_and_frees_its_place(tiny_bert: Path) -> None:
    with held(tiny_bert) as (policy, client):
        started = monotonic()
        refused = client.post("/rerank", json=BODY | {"grating": {"deadline_ms": 200}})
        assert refused.status_code == 504
        assert "200 ms" in refused.json()["message"]
        assert monotonic() - started < 5
        assert gauge(client, "grating_queue_requests") == gauge(client, "grating_queue_tokens") == 0
        policy.go.set()
        assert client.post("/rerank", json=BODY).status_code == 200


def test_a_request_cannot_have_more_time_than_the_server_gives(tiny_bert: Path) -> None:
    with held(tiny_bert, deadline=0.2) as (_, client):
        assert client.post("/rerank", json=BODY | {"grating": {"deadline_ms": 60_000}}).status_code == 504


def test_a_client_that_leaves_stops_costing(tiny_bert: Path) -> None:
    with held(tiny_bert) as (policy, client):
        with pytest.raises(httpx.ReadTimeout):
            client.post("/rerank", json=BODY, timeout=0.3)
        until(lambda: gauge(client, "grating_queue_requests") == 0)
        policy.go.set()
        sleep(0.1)
        assert policy.layers == [1]  # no other layer was computed for it
        answer = client.post("/rerank", json=BODY)
        assert answer.status_code == 200


def test_health_answers_while_requests_are_computed(tiny_bert: Path) -> None:
    with held(tiny_bert) as (policy, client), ThreadPoolExecutor() as pool:
        computed = pool.submit(client.post, "/rerank", json=BODY)
        policy.reached.wait(10)
        assert client.get("/health").json() == {"status": "ok"}
        policy.go.set()
        assert computed.result().status_code == 200


def test_a_server_that_is_stopped_finishes_what_it_accepted(tiny_bert: Path) -> None:
    policy = StandsStill()
    with ThreadPoolExecutor() as pool:
        with serving(load(tiny_bert, pruning=policy)) as address, httpx.Client(base_url=address) as client:
            answers = [pool.submit(httpx.post, f"{address}/rerank", json=BODY) for _ in range(3)]
            until(lambda: gauge(client, "grating_queue_requests") == 3)
            threading.Timer(0.5, policy.go.set).start()  # the server is stopped before
        assert policy.go.is_set()
        assert [answer.result().status_code for answer in answers] == [200] * 3
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{address}/health")


class Breaks:
    """A policy that fails with a text in its message."""

    def route(self, layer: int, scores: Any, top_k: int) -> list[Route]:
        raise RuntimeError("a secret of /home/somebody")


def test_an_error_of_the_server_leaks_nothing(tiny_bert: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serving(load(tiny_bert, pruning=Breaks())) as address, caplog.at_level("INFO"):
        failed = httpx.post(f"{address}/rerank", json=BODY, headers={"X-Request-ID": "mine"})
        assert failed.status_code == 500
        assert failed.json()["id"] == failed.headers["X-Request-ID"] == "mine"
        assert "secret" not in failed.text
        assert "Traceback" not in failed.text
        assert httpx.post(f"{address}/rerank", json={**BODY, "top_n": 2}).status_code == 200
    (record,) = [one.told for one in caplog.records if getattr(one, "told", {}).get("status") == 500]
    assert (record["id"], record["error"]) == ("mine", "RuntimeError")
    assert "secret" not in str(record)


def test_a_key_is_asked_for_everywhere_but_where_nothing_is_told(tiny_bert: Path) -> None:
    with serving(load(tiny_bert), api_key="schlüssel") as address:
        for shown in (None, "Bearer other", "Bearer", "Basic x", "Bearer schlüssel1"):
            headers = {} if shown is None else {"Authorization": shown.encode()}
            refused = httpx.post(f"{address}/rerank", json=BODY, headers=headers)
            assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
            assert refused.json()["error"]["type"] == "authentication"
        key = {"Authorization": "Bearer schlüssel".encode()}
        assert httpx.post(f"{address}/rerank", json=BODY, headers=key).status_code == 200
        statuses = {path: httpx.get(address + path).status_code for path in ("/health", "/docs", "/openapi.json")}
        assert set(statuses.values()) == {200}
        for path in ("/info", "/metrics", "/v1/models"):
            assert httpx.get(address + path).status_code == 401
            assert httpx.get(address + path, headers=key).status_code == 200


def test_request_ids_are_kept_if_they_are_ids(client: httpx.Client) -> None:
    for given, kept in (("abc-1.2_3", True), ("a b", False), ("x" * 65, False), ("", False)):
        found = client.get("/health", headers={"X-Request-ID": given}).headers["X-Request-ID"]
        assert (found == given) is kept
        assert 0 < len(found) <= 64


def test_logs_have_numbers_but_no_texts(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        client.post("/rerank", json={"query": "Geheimnis?", "documents": ["Verschlusssache", "x"]})
        client.post("/rerank", json={"query": "Geheimnis?", "documents": ["Verschlusssache", 5]})
        client.post("/rerank", json={"query": "Geheimnis " * 600, "documents": ["Verschlusssache"]})
        client.get("/Verschlusssache?query=Geheimnis")
    told = [one.told for one in caplog.records if hasattr(one, "told")]
    assert [record["status"] for record in told] == [200, 422, 422, 404]
    assert told[0]["documents"] == 2
    assert told[0]["tokens"] > 0
    for record in caplog.records:
        if record.name in ("httpx", "uvicorn.access"):  # the client's own, and what only pytest switches on
            continue
        assert "Geheimnis" not in f"{record.getMessage()} {getattr(record, 'told', '')}"
        assert "Verschlusssache" not in f"{record.getMessage()} {getattr(record, 'told', '')}"


def test_metrics_count_what_was_done(tiny_bert: Path) -> None:
    with serving(load(tiny_bert)) as address:
        for _ in range(2):
            httpx.post(f"{address}/rerank", json=BODY | {"documents": ["w2", "w3 " * 200]})
        httpx.post(f"{address}/rerank", json={})
        text = httpx.get(f"{address}/metrics").text
    assert 'grating_requests_total{path="/rerank",status="200"} 2.0' in text
    assert 'grating_requests_total{path="/rerank",status="422"} 1.0' in text
    assert 'grating_documents_total{model="berlin"} 4.0' in text
    assert 'grating_truncated_documents_total{model="berlin"} 2.0' in text
    assert 'grating_request_seconds_count{path="/rerank"} 3.0' in text
    assert 'grating_queue_tokens{model="berlin"} 0.0' in text
