"""The compiled embeddings against those in torch: made-up tables, rows that are missing, every level."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grating_core.kernels import compiled, reference
from grating_core.kernels.loading import KernelsError, levels, start
from grating_core.kernels.operands import Lookup, Norm

try:
    LEVELS = levels()
except KernelsError as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.usefixtures("best_level")
BOUND = {torch.float32: 1e-5, torch.bfloat16: 0.008}


@st.composite
def calls(draw):
    """Draw tables, the rows of tokens, a factor and a norm; tensors come from the seed."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dtype, width = draw(st.sampled_from(list(BOUND))), draw(st.sampled_from([1, 15, 16, 33, 64, 100, 384]))
    tokens = draw(st.sampled_from([0, 1, 2, 33, 200]))
    lookups = [
        Lookup(torch.randn(rows, width).to(dtype), torch.randint(0, rows, (tokens,)))
        for rows in draw(st.lists(st.integers(1, 50), min_size=1, max_size=3))
    ]
    weight, bias = torch.randn(2, width)
    norms = (
        None,
        Norm("layer", 1e-5, 0.0, weight),
        Norm("layer", 1e-5, 0.0, weight, bias),
        Norm("rms", 1e-5, 1.0, weight),
    )
    return lookups, draw(st.sampled_from([1.0, 22.6])), draw(st.sampled_from(norms))


@given(calls(), st.sampled_from([1, 2]))
@settings(max_examples=100, deadline=None)
def test_the_embeddings_are_those_in_torch(call, threads):
    lookups, factor, norm = call
    table, rows = lookups[0]
    room = torch.full((len(rows), table.shape[1] + 5), 7.0).to(table.dtype)
    expected = torch.empty(len(rows), table.shape[1], dtype=table.dtype)
    reference.embed(lookups, factor, norm, expected)
    torch.set_num_threads(threads)
    for level in LEVELS:
        start(level)
        compiled.embed(lookups, factor, norm, room[:, :-5])
        bound = BOUND[table.dtype]
        torch.testing.assert_close(
            room[:, :-5], expected, rtol=bound, atol=bound, msg=lambda text, level=level: f"{level}: {text}"
        )
        assert (room[:, -5:] == 7).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("row", [-1, 5, 2**40])
def test_a_row_that_a_table_lacks_is_refused(level, row):
    start(level)
    tables = Lookup(torch.randn(9, 32), torch.tensor([0, 8])), Lookup(torch.randn(5, 32), torch.tensor([4, row]))
    for embed in (compiled.embed, reference.embed):
        with pytest.raises(IndexError):
            embed(tables, 1.0, None, torch.empty(2, 32))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("fault", [torch.nan, torch.inf])
def test_a_faulty_row_shows_in_its_tokens_alone(level, fault):
    start(level)
    table = torch.randn(6, 40)
    table[3, 7] = fault
    norm, output = Norm("layer", 1e-5, 0.0, torch.ones(40)), torch.empty(4, 40)
    compiled.embed([Lookup(table, torch.tensor([0, 3, 5, 3]))], 1.0, norm, output)
    assert output[[0, 2]].isfinite().all()
    assert output[[1, 3]].isnan().any(1).all()
