"""Which kernels compute is chosen once in a process, and said wherever someone may ask."""

import json
from collections.abc import Iterator

import pytest
import torch

from grating_core import Reranker
from grating_core.kernels.choice import VARIABLE, kernels
from grating_core.kernels.loading import KernelsError, levels
from tests.core.cli.conftest import grating

QUERY, DOCUMENTS = "What makes bread rise?", ["Yeast turns sugar into gas.", "Berlin has museums."]


@pytest.fixture
def chosen_anew() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(VARIABLE, raising=False)
        kernels.cache_clear()
        yield
    kernels.cache_clear()
    kernels()


def levels_here() -> list[str]:
    """Return the levels that this processor has; none without the compiled module."""
    try:
        return levels()
    except KernelsError:
        return []


def test_the_best_level_is_taken_or_a_reason_is_given(chosen_anew: None) -> None:
    found = levels_here()
    assert kernels().level == (found[0] if found else None)
    assert bool(kernels().reason) != bool(found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_variable_chooses_a_level_and_the_trace_names_it(
    dtype: str, chosen_anew: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = levels_here()
    for level in dict.fromkeys(("torch", *found[:1], *found[-1:])):
        monkeypatch.setenv(VARIABLE, level)
        kernels.cache_clear()
        assert (kernels().level or "torch") == level
        expected = level if kernels().has(getattr(torch, dtype)) else "torch"
        with Reranker.from_pretrained("bundled:ms-marco-minilm-l12", dtype=dtype) as reranker:
            trace = reranker.rerank(QUERY, DOCUMENTS).trace
        assert trace.kernels == expected
        assert trace.summary()["kernels"] == expected


def test_a_level_that_is_not_there_is_named_and_torch_computes(
    chosen_anew: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "sse2")
    assert kernels().level is None
    assert "grating-kernels" in kernels().reason or "'sse2'" in kernels().reason


def test_doctor_says_why_torch_computes(chosen_anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "torch")
    found = json.loads(grating("doctor", "--json").stdout)
    assert found["kernels"] is None
    assert VARIABLE in found["kernels_reason"]
    assert f"none. The environment variable {VARIABLE}" in " ".join(grating("doctor").stdout.split())
