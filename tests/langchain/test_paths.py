"""Paths into memories lead where LangGraph's own function leads."""

import json

import pytest
from langchain_grating.paths import values_at
from langgraph.store.base import get_text_at_path

VALUE = {
    "text": "[1]",
    "kind": None,
    "when": 2024,
    "ok": True,
    "odd.name": "x",
    "content": {
        "title": "Berlin",
        "turns": [{"say": "3.7 million", "by": {"name": "Ann"}}, {"say": "people", "by": None}, "said"],
    },
    "rows": [[1, 2], [3], {"a": [4]}],
}


@pytest.mark.parametrize(
    "path",
    [
        "text", "kind", "when", "ok", "odd.name", "nowhere", "content", "content.title", "content.title.more",
        "content.turns", "content.turns[0]", "content.turns[-1]", "content.turns[*]", "content.turns[*].say",
        "content.turns[5]", "content.turns[-9]", "content.turns[one]", "content.turns[]",
        "content.turns[*].by.name",
        "content.*", "*", "*.title", "*.turns[0].say", "rows[*][*]", "rows[1][0]", "rows.*", "rows[*].a[0]",
        "{text,when}", "{text, kind, nowhere}", "content.{title,turns}", "{content.title,text}", "{}", "{,text}",
        "content.turns[*].{say,by.name}", "{content.turns[0],text}", "rows[0]{a}", "text[0]", "text.*", ".text",
        "content..title", "[0]", "[*]", "{text", "content.turns[0", "$", "", "rows[+1]", "rows[ 1 ]",
        "{text}.more", "{content}.title",
    ],
)  # fmt: skip
def test_as_langgraph_reads_it(path):
    """Its function writes an object or a list as JSON, and everything else as text."""
    ours = [
        json.dumps(found, sort_keys=True, ensure_ascii=False) if isinstance(found, list | dict) else str(found)
        for found in values_at(VALUE, path)
    ]
    assert ours == get_text_at_path(VALUE, path)
