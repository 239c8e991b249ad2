"""From a budget to a plan."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grating_core import Reranker
from grating_core.engine.ragged import filled
from grating_core.errors import BudgetError
from grating_core.memory.plan import ModelSizes, make_generation_plan, make_plan
from tests.core.conftest import BUNDLED

M3 = ModelSizes(
    layers=(25_200_000,) * 24, bytes_read=(25_200_000,) * 24, vocabulary=250_002, row=2048, rest=21_000_000,
    converted=False, hidden=2048, work=24_576, window=8192, keys=8192 * 4096,
)  # fmt: skip

sizes = st.builds(
    lambda depth, layer, vocabulary, row, window, converted: ModelSizes(
        layers=(layer,) * depth, bytes_read=(layer,) * depth, vocabulary=vocabulary, row=row, rest=layer,
        converted=converted, hidden=row, work=12 * row, window=window, keys=2 * window * row,
    ),
    st.integers(1, 40), st.integers(1, 10**8), st.integers(1, 300_000), st.integers(2, 10_000),
    st.integers(8, 8192), st.booleans(),
)  # fmt: skip


@given(sizes, st.integers(0, 3 * 10**9))
def test_a_plan_keeps_to_its_budget(model: ModelSizes, more: int) -> None:
    with pytest.raises(BudgetError) as told:
        make_plan(model, 1)
    plan = make_plan(model, told.value.smallest + more)
    assert plan.total <= plan.budget
    assert sorted([*plan.resident, *plan.streamed]) == list(range(1, len(model.layers) + 1))
    assert len(plan.streamed) not in (1, 2)
    assert 1 <= plan.embedding_rows <= model.vocabulary
    assert plan.hidden_tokens >= 3 * filled(plan.slice_tokens)
    assert plan.pass_tokens >= plan.slice_tokens
    with pytest.raises(BudgetError):
        make_plan(model, told.value.smallest - 1)
    assert make_plan(model, max(told.value.resident, told.value.smallest)).streamed == ()


@given(sizes, st.integers(128, 4096), st.booleans(), st.integers(0, 3 * 10**9))
def test_a_plan_for_generating_keeps_to_its_budget(
    model: ModelSizes, max_length: int, tied: bool, more: int
) -> None:
    model = replace(model, keys=max_length * model.row, table_needed=tied)
    with pytest.raises(BudgetError) as told:
        make_generation_plan(model, 1, max_length)
    plan = make_generation_plan(model, told.value.smallest + more, max_length)
    assert plan.total <= plan.budget
    assert plan.parts["keys and values"] == model.keys
    assert sorted([*plan.resident, *plan.streamed]) == list(range(1, len(model.layers) + 1))
    assert len(plan.streamed) not in (1, 2)
    assert plan.table_resident or not tied
    with pytest.raises(BudgetError):
        make_generation_plan(model, told.value.smallest - 1, max_length)
    richest = make_generation_plan(model, told.value.resident, max_length)
    assert richest.streamed == ()
    assert richest.table_resident


@given(st.integers(195, 3000), st.integers(0, 500))
def test_more_budget_keeps_more(megabytes: int, more: int) -> None:
    less, richer = make_plan(M3, megabytes * 10**6), make_plan(M3, (megabytes + more) * 10**6)
    assert len(richer.resident) >= len(less.resident)
    assert richer.slice_tokens >= less.slice_tokens
    assert richer.bytes_read() <= less.bytes_read()


def test_streamed_layers_are_spread() -> None:
    streamed = make_plan(M3, 500_000_000).streamed
    gaps = {after - before for before, after in pairwise(streamed)}
    assert streamed[0] == 1
    assert max(gaps) - min(gaps) <= 1


def test_too_small_a_budget_is_told_what_would_do() -> None:
    with pytest.raises(BudgetError, match=r"memory_budget=1,000,000 bytes is too small.*needs \d+MB") as told:
        Reranker.from_pretrained(BUNDLED, memory_budget="1MB")
    assert isinstance(told.value, ValueError)
    with Reranker.from_pretrained(BUNDLED, memory_budget=told.value.smallest) as reranker:
        assert reranker.plan is not None
        assert reranker.plan.resident == ()
        assert reranker.plan.tokenizer is not None
    with Reranker.from_pretrained(BUNDLED, memory_budget=told.value.resident) as reranker:
        assert reranker.plan.streamed == ()
        assert reranker.plan.table_resident


def test_the_real_model_within_a_budget(bundled: Reranker) -> None:
    documents = [f"Berlin has {n} million inhabitants. " * (n % 40 + 1) for n in range(30)]
    expected = bundled.rerank("How many people live in Berlin?", documents, 5).ranking
    with Reranker.from_pretrained(BUNDLED, memory_budget="130MB", dtype="float32", pruning="off") as reranker:
        result = reranker.rerank("How many people live in Berlin?", documents, 5)
    assert result.trace.bytes_read > 0
    assert [ranked.index for ranked in result.ranking] == [ranked.index for ranked in expected]
    assert [r.score for r in result.ranking] == pytest.approx([r.score for r in expected], abs=1e-4)
