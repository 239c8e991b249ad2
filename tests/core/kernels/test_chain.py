"""Three maps one behind the other give what each map gives alone."""

import pytest
import torch

from grating_core.kernels import compiled, reference
from grating_core.kernels.groups import grouped_weight
from grating_core.kernels.loading import has
from grating_core.kernels.operands import Map, Norm, Rows, Then, Weight
from grating_core.kernels.packing import packed_weight

WIDTH, INNER = 70, 150


def drawn(columns: int, inner: int, dtype: torch.dtype) -> Weight:
    return packed_weight(torch.randn(columns, inner) / inner**0.5, torch.randn(columns), dtype)


def maps_of(states: torch.dtype, dtypes: tuple[torch.dtype, ...], *, behind: bool) -> tuple[Map, Map, Map]:
    """Return the second half of a layer, with its norms behind or before what is added."""
    norm = Norm("layer", 1e-5, 0.0, torch.randn(WIDTH), torch.randn(WIDTH))
    inner, last = dtypes[1] == torch.int8, dtypes[2] == torch.int8
    if behind:
        then, end, gate = Then(states, norm=norm, quantized=inner), Then(states, norm=norm), None
    else:
        rms = Norm("rms", 1e-5, 1.0, torch.randn(WIDTH))
        then = Then(states, first_norm=rms, norm=norm, factor=0.5, total=True, output=not inner, quantized=inner)
        end, gate = Then(states, factor=0.5), drawn(INNER, WIDTH, dtypes[1])
    middle = Then(states, "gelu", output=not last, quantized=last)
    weights = (drawn(WIDTH, WIDTH, dtypes[0]), drawn(INNER, WIDTH, dtypes[1]), drawn(WIDTH, INNER, dtypes[2]))
    return Map(weights[0], then), Map(weights[1], middle, gate), Map(weights[2], end)


@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [(), (0,), (1,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("behind", [True, False], ids=["behind", "before"])
def test_a_chain_is_what_torch_computes(
    level: str, states: torch.dtype, kept: tuple[int, ...], *, behind: bool
) -> None:
    dtypes = tuple(states if place in kept else torch.int8 for place in range(3))
    if kept and not has(states):
        pytest.skip(f"{level} has no products of {states}")
    maps = maps_of(states, dtypes, behind=behind)
    attended, hidden = torch.randn(300, WIDTH).to(states), torch.randn(300, WIDTH).to(states)
    rows = reference.normed_rows(attended, None, output=False, quantized=True)[1]
    x = Rows(attended) if 0 in kept or rows is None else rows
    found, expected = hidden.clone(), hidden.clone()
    compiled.chain(x, maps, found)
    reference.chain(x, maps, expected)
    # Where rounding to 8 bits meets a tie, one entry of a row may differ by one step.
    assert (found.float() - expected.float()).abs().max() < (0.06 if states == torch.float32 else 0.2)
    for count in (1, 33):  # fewer rows are computed in another way
        some = Rows(x.data[:count], None if x.scale is None else x.scale[:count])
        alone = hidden[:count].clone()
        compiled.chain(some, maps, alone)
        assert torch.equal(alone, found[:count])


@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_chain_unpacks_its_weights(level: str, states: torch.dtype, bits: int | None) -> None:
    def quantized(columns: int, inner: int) -> Weight:
        matrix, bias = torch.randn(columns, inner) / inner**0.5, torch.randn(columns)
        return packed_weight(matrix, bias, torch.int8) if bits is None else grouped_weight(matrix, bias, bits)

    rms = Norm("rms", 1e-5, 1.0, torch.randn(WIDTH))
    maps = (
        Map(quantized(WIDTH, WIDTH), Then(states, norm=rms, total=True)),
        Map(quantized(INNER, WIDTH), Then(states, "silu"), quantized(INNER, WIDTH)),
        Map(quantized(WIDTH, INNER), Then(states)),
    )
    attended, hidden = torch.randn(300, WIDTH).to(states), torch.randn(300, WIDTH).to(states)
    found, expected = hidden.clone(), hidden.clone()
    compiled.chain(Rows(attended), maps, found)
    reference.chain(Rows(attended), maps, expected)
    assert (found - expected).float().norm() < (
        1e-5 if states == torch.float32 else 0.01
    ) * expected.float().norm()
    alone = hidden[:1].clone()
    compiled.chain(Rows(attended[:1]), maps, alone)
    assert torch.equal(alone, found[:1])
