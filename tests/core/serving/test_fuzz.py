"""Whatever comes, the server answers, and never with an error of its own."""

import json
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

TEXT = st.text(max_size=30) | st.text(alphabet="w1 \x00\ud800\n", max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
DOCUMENTS = st.lists(TEXT | st.fixed_dictionaries({"text": TEXT}) | JSON, max_size=5)
FIELDS = {
    "query": TEXT, "documents": DOCUMENTS, "texts": st.lists(TEXT, max_size=5), "model": st.none() | TEXT,
    "top_n": st.none() | st.integers(-2, 2**70), "return_documents": st.none() | st.booleans(),
    "raw_scores": st.booleans(), "truncate": st.none() | st.booleans(), "return_text": st.booleans(),
    "text_1": TEXT | st.lists(TEXT, max_size=4), "text_2": TEXT | st.lists(TEXT, max_size=4),
    "grating": st.fixed_dictionaries(
        {},
        optional={
            "target": st.floats() | st.none(), "pruning": st.sampled_from(["auto", "cluster", "off", "on"]),
            "scores": st.sampled_from(["exact", "estimated", "x"]), "deadline_ms": st.integers(-1, 10**30),
            "trace": st.booleans(), "raw_scores": st.booleans(), "other": JSON,
        },
    ),
}  # fmt: skip
BODIES = st.fixed_dictionaries({}, optional={name: values | JSON for name, values in FIELDS.items()})
VALID = st.fixed_dictionaries(
    {"query": TEXT, "documents": st.lists(TEXT, max_size=5)},
    optional={name: FIELDS[name] for name in ("top_n", "return_documents", "grating")},
)
PATHS = st.sampled_from(["/rerank", "/v1/rerank", "/v2/rerank", "/score", "/v1/score"])
REFUSALS = {404, 413, 422, 504}


def check(answer: httpx.Response) -> None:
    assert answer.status_code == 200 or answer.status_code in REFUSALS, answer.text
    told: Any = answer.json()
    if answer.status_code != 200:
        message = told["error"] if "error_type" in told else told["message"]
        assert isinstance(message, str)
        assert len(message) < 1000


@given(PATHS, BODIES | VALID)
def test_no_body_is_an_error_of_the_server(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    check(client.post(path, content=json.dumps(body)))


@pytest.mark.slow
@given(PATHS, BODIES | VALID)
@settings(max_examples=1000)
def test_a_thousand_bodies_are_no_error_of_the_server(
    client: httpx.Client, path: str, body: dict[str, Any]
) -> None:
    check(client.post(path, content=json.dumps(body)))


@given(PATHS, st.binary(max_size=200))
@settings(max_examples=40)
def test_no_bytes_are_an_error_of_the_server(client: httpx.Client, path: str, body: bytes) -> None:
    check(client.post(path, content=body))


def test_deep_nesting_is_refused(client: httpx.Client) -> None:
    check(client.post("/rerank", content=b'{"query": ' + b"[" * 100_000))
    check(client.post("/rerank", content=b'{"query": "a", "documents": ' + b"[" * 5000 + b"]" * 5000 + b"}"))
