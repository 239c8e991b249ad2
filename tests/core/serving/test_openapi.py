"""The document and its page say what the server checks, and need no other host."""

import re
from typing import Any

import httpx
import jsonschema
import pytest

from tests.core.serving.conftest import DOCUMENTS, NAME, QUERY


@pytest.fixture(scope="module")
def document(client: httpx.Client) -> dict[str, Any]:
    return client.get("/openapi.json").json()


def schema_of(document: dict[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    return content["content"]["application/json"]["schema"] | {"components": document["components"]}


def test_the_document_lists_every_path(client: httpx.Client, document: dict[str, Any]) -> None:
    for path, methods in document["paths"].items():
        for method in methods:
            assert client.request(method, path).status_code in (200, 422)
    ranks = {"/rerank", "/v1/rerank", "/v2/rerank", "/reranking", "/v1/reranking"}
    others = {"/score", "/v1/score", "/health", "/info", "/v1/models", "/metrics"}
    assert set(document["paths"]) == ranks | others


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/rerank", {"query": QUERY, "documents": DOCUMENTS, "model": NAME, "grating": {"trace": True}}),
        ("/v2/rerank", {"query": QUERY, "documents": [{"text": text} for text in DOCUMENTS], "top_n": 2}),
        ("/rerank", {"query": QUERY, "texts": DOCUMENTS, "return_text": True}),
        ("/v1/score", {"text_1": QUERY, "text_2": DOCUMENTS}),
        ("/v1/score", {"text_1": [QUERY] * 3, "text_2": DOCUMENTS}),
    ],
)
def test_bodies_and_answers_are_as_the_document_says(
    client: httpx.Client, document: dict[str, Any], path: str, body: dict[str, Any]
) -> None:
    described = document["paths"][path]["post"]
    jsonschema.validate(body, schema_of(document, described["requestBody"]))
    answer = client.post(path, json=body)
    jsonschema.validate(answer.json(), schema_of(document, described["responses"]["200"]))


def test_what_the_document_forbids_is_refused(client: httpx.Client, document: dict[str, Any]) -> None:
    schema = schema_of(document, document["paths"]["/v1/rerank"]["post"]["requestBody"])
    for body in (
        {"query": QUERY},
        {"query": QUERY, "documents": [5]},
        {"query": QUERY, "documents": [], "top_n": -1},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(body, schema)
        assert client.post("/v1/rerank", json=body).status_code == 422


def test_the_page_needs_no_other_host(client: httpx.Client) -> None:
    page = client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert re.findall(r"(?:src|href)=\"(?!#)([^\"]+)", page.text) == ["openapi.json"]
    assert "<script" not in page.text
    for field in ("documents", "top_n", "deadline_ms", "compute_share", "truncation_direction"):
        assert field in page.text
    links = set(re.findall(r'href="#(\w+)"', page.text))
    assert links <= set(re.findall(r'id="(\w+)"', page.text))
