"""The OpenAPI document is made of the schemas that check the bodies; the page shows it without any other host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_SCHEMAS = "#/components/schemas/"
_REFUSALS = {
    "401": "The key is missing or wrong.",
    "404": "No model has this name.",
    "413": "The request has too many bytes, documents or tokens.",
    "422": "A field is wrong; the sentence names it.",
    "429": "Too much waits already; Retry-After says when to come again.",
    "504": "The deadline has passed.",
}


@dataclass(frozen=True)
class Described:
    """A path as the document describes it.

    Attributes:
        path: The path.
        method: The method, in small letters.
        about: What it does, in a sentence.
        bodies: The bodies that it takes; none for a GET.
        answers: The answers, one for each body.
    """

    path: str
    method: str
    about: str
    bodies: Sequence[type[BaseModel]] = ()
    answers: Sequence[type[BaseModel]] = ()


def document(paths: Sequence[Described], *, keyed: bool) -> dict[str, Any]:
    """Return the OpenAPI document.

    Args:
        paths: All paths.
        keyed: Whether requests need a key.
    """
    taken: list[tuple[type[BaseModel], Any]] = []
    for one in paths:
        taken += [(body, "validation") for body in one.bodies] + [
            (answer, "serialization") for answer in one.answers
        ]
    references, schemas = models_json_schema(list(dict.fromkeys(taken)), ref_template=_SCHEMAS + "{model}")
    described: dict[str, dict[str, Any]] = {}
    for one in paths:
        answered = [references[answer, "serialization"] for answer in one.answers]
        operation: dict[str, Any] = {
            "summary": one.about,
            "operationId": f"{one.method}{one.path.replace('/', '_')}",
            "responses": {"200": {"description": "The answer.", **_json(answered)}},
        }
        if one.bodies:
            operation["requestBody"] = {
                "required": True,
                **_json([references[body, "validation"] for body in one.bodies]),
            }
            operation["responses"] |= {status: {"description": told} for status, told in _REFUSALS.items()}
        described.setdefault(one.path, {})[one.method] = operation
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "grating", "version": "1", "description": "Reranking over HTTP."},
        "paths": described,
        "components": {"schemas": schemas.get("$defs", {})},
    }
    if keyed:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
    return found


def _json(schemas: Sequence[Any]) -> dict[str, Any]:
    if not schemas:
        return {}
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": list(schemas)}
    return {"content": {"application/json": {"schema": schema}}}


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>grating: paths of this server</title>
<style>body{{font:1rem/1.5 system-ui,sans-serif;max-width:60rem;margin:auto;padding:1rem}}
table{{border-collapse:collapse;width:100%;display:block;overflow-x:auto}}
td,th{{text-align:left;vertical-align:top;padding:.3rem .6rem;border-bottom:1px solid #8886}}
code{{font-size:.9em}}h2{{margin-top:2rem}}</style></head>
<body><h1>Paths of this server</h1>
<p>The same for programs: <a href="openapi.json">openapi.json</a>.</p>{paths}
<h1>Objects</h1>{schemas}</body></html>
"""


def page(found: dict[str, Any]) -> str:
    """Return the OpenAPI document as a page of HTML."""
    paths = "".join(
        f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(operation['summary'])}.</p>"
        f"<p>{_takes(operation)}</p>"
        for path, methods in found["paths"].items()
        for method, operation in methods.items()
    )
    schemas = "".join(
        f'<h2 id="{escape(name)}"><code>{escape(name)}</code></h2>'
        f"<p>{escape(schema.get('description', ''))}</p>{_fields(schema)}"
        for name, schema in found["components"]["schemas"].items()
    )
    return _PAGE.format(paths=paths, schemas=schemas)


def _takes(operation: dict[str, Any]) -> str:
    taken = _kind(operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema"))
    answer = operation["responses"]["200"].get("content", {}).get("application/json", {}).get("schema")
    return " ".join(f"{word} {kind}." for word, kind in (("Takes", taken), ("Returns", _kind(answer))) if kind)


def _fields(schema: dict[str, Any]) -> str:
    required = schema.get("required", ())
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code>{'' if name in required else ' (optional)'}</td>"
        f"<td>{_kind(field)}</td><td>{escape(field.get('description', ''))}</td></tr>"
        for name, field in schema.get("properties", {}).items()
    )
    return f"<table><tr><th>field</th><th>kind</th><th></th></tr>{rows}</table>" if rows else ""


def _kind(schema: dict[str, Any] | None) -> str:
    """Return what a schema allows, in words."""
    if not schema:
        return ""
    if name := schema.get("$ref", "").removeprefix(_SCHEMAS):
        return f'<a href="#{escape(name)}"><code>{escape(name)}</code></a>'
    if choices := schema.get("anyOf"):
        return " or ".join(map(_kind, choices))
    if values := schema.get("enum"):
        return " or ".join(f"<code>{escape(str(value))}</code>" for value in values)
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items'))}"
    return escape(str(schema.get("const", schema.get("type", "anything"))))
