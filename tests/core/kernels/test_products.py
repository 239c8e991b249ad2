"""Compiled products, norms and quantising against those in torch, on made-up shapes and with faulty rows.

What is promised: sums of int8 products are exact. Whatever else differs from torch differs by rounding. A row that
is not finite changes no other row. A row has the same bits whatever rows come along, with any number of threads.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grating_core.kernels import compiled, reference
from grating_core.kernels.activations import ACTIVATIONS
from grating_core.kernels.groups import grouped_weight, weight_with_zeros
from grating_core.kernels.loading import KernelsError, has, levels, start
from grating_core.kernels.operands import Finished, Norm, Rows, Then, Weight
from grating_core.kernels.packing import LEAST, pack, packed_weight, quantized_rows

try:
    LEVELS = levels()
except KernelsError as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.usefixtures("best_level")

WIDTHS = st.sampled_from([1, 2, 3, 5, 16, 31, 32, 33, 63, 64, 65, 100, 127, 257, 700])
COUNTS = st.sampled_from([1, 2, 3, 7, 15, 16, 17, 31, 33, 100, 130])
FORMATS = {
    "int8": lambda matrix, bias: packed_weight(matrix, bias, torch.int8),
    "8 bits": lambda matrix, bias: grouped_weight(matrix, bias, 8),
    "4 bits": lambda matrix, bias: grouped_weight(matrix, bias, 4),
    "4 bits and minima": lambda matrix, bias: grouped_weight(matrix, bias, 4, minima=True),
    "4 bits and zeros": weight_with_zeros,
}
"""Weights that are unpacked to the dtype of states."""
FAULTS = {
    "NaN": torch.nan,
    "NaN with a payload": torch.tensor(0x7FC00001, dtype=torch.int32).view(torch.float32).item(),
    "infinity": torch.inf,
    "minus infinity": -torch.inf,
}


@st.composite
def calls(draw):
    """Draw what a call computes, with the dtype of its rows; tensors come from the seed."""
    seed = draw(st.integers(0, 2**31))
    torch.manual_seed(seed)
    dtype = draw(st.sampled_from([torch.int8, torch.int8, torch.bfloat16, torch.float32]))
    states = draw(st.sampled_from([torch.bfloat16, torch.float32])) if dtype == torch.int8 else dtype
    formats = st.just(None) if dtype == torch.int8 else st.sampled_from([None, *FORMATS])
    count, inner, columns = draw(COUNTS), draw(WIDTHS), draw(WIDTHS)
    norms = st.sampled_from([None, "layer", "rms"])

    def norm(kind: str | None) -> Norm | None:
        if kind == "rms":
            return Norm(kind, 1e-3, draw(st.sampled_from([0.0, 1.0])), torch.randn(columns))
        return kind and Norm(kind, 1e-3, 0.0, torch.randn(columns), torch.randn(columns))

    def weight() -> Weight:
        bias = torch.randn(columns) if draw(st.booleans()) else None
        matrix, name = torch.randn(columns, inner) / inner**0.5, draw(formats)
        return packed_weight(matrix, bias, dtype) if name is None else FORMATS[name](matrix, bias)

    quantized, output, total = draw(st.sampled_from([(1, 0, 0), (0, 1, 0), (1, 1, 1), (0, 1, 1), (1, 0, 1)]))
    then = Then(
        states,
        draw(st.sampled_from([None, "gelu", "gelu_new", "silu", "relu", "tanh"])),
        norm(draw(norms)),
        draw(st.sampled_from([1.0, 0.7])),
        norm(draw(norms)),
        bool(total),
        bool(output),
        bool(quantized),
    )
    x = torch.randn(count, inner).to(states)
    for row, fault in draw(
        st.dictionaries(st.integers(0, count - 1), st.sampled_from([*FAULTS, "least", "zeros"]))
    ).items():
        if fault == "zeros":
            x[row] = 0
        elif fault == "least":
            x[row] *= 1e-39
        else:
            x[row, torch.randint(inner, ())] = FAULTS[fault]
    residual = torch.randn(count, columns).to(states) if draw(st.booleans()) else None
    return x, dtype, weight(), then, weight() if draw(st.booleans()) else None, residual


def rows_of(x: Tensor, dtype: torch.dtype) -> Rows:
    """Return states, or int8 rows of them."""
    if dtype != torch.int8:
        return Rows(x)
    found = compiled.normed_rows(x, None, output=False, quantized=True)[1]
    assert found is not None
    return found


def part(rows: Rows, of: slice) -> Rows:
    """Return some of the rows."""
    return Rows(rows.data[of], None if rows.scale is None else rows.scale[of])


def tensors(finished: Finished) -> list[Tensor]:
    """Return all that a call gave, as integers: one for all NaN, so that NaN equals NaN."""
    rows = finished.rows
    found = [finished.total, finished.output, *(() if rows is None else (rows.data, rows.scale))]
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32}
    return [
        (x.where(x == x, torch.nan) if x.is_floating_point() else x).view(kinds[x.itemsize])
        for x in found
        if x is not None
    ]


def ready(level: str, dtype: torch.dtype) -> bool:
    """Start the level, and tell whether it has products of this dtype."""
    start(level)
    return has(dtype)


def ready_for(level: str, *weights: Weight | None) -> bool:
    """Start the level, and tell whether it has what products with these weights take."""
    start(level)
    return all(weight is None or weight.bits is not None or has(weight.dtype) for weight in weights)


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=40)
@given(calls())
def test_a_product_and_what_follows_equal_torch(level, call):
    x, dtype, weight, then, gate, residual = call
    if not ready_for(level, weight, gate):
        return
    rows = rows_of(x, dtype)
    found = compiled.linear(rows, weight, then, gate=gate, residual=residual)
    exact = Then(torch.float32, then.activation, then.first_norm, then.factor, then.norm, True, True)
    # A level without products of bf16 does not round what it unpacks.
    factors = Rows(rows.data.float()) if dtype == torch.bfloat16 and not has(dtype) else rows
    wanted = reference.linear(factors, weight, exact, gate=gate, residual=residual)
    # A norm divides by at least sqrt(1e-3), so that it makes an error 32 times as large at most.
    bound = 3e-5 * 32 ** ((then.first_norm is not None) + (then.norm is not None))
    rounding = 2**-8 if then.states == torch.bfloat16 else 0.0
    for ours, theirs in ((found.total, wanted.total), (found.output, wanted.output)):
        if ours is not None:
            close(ours.float(), theirs, bound, rounding)
    if found.rows is not None:
        scale, middle = found.rows.scale.split(1, dim=-1)
        finite = wanted.output.isfinite().all(-1)
        assert torch.equal(scale.flatten().isfinite(), finite)
        back = found.rows.data[:, : weight.columns] * scale + middle
        close(back[finite], wanted.output[finite], bound, rounding, 0.51 * scale[finite])
        assert not found.rows.data[:, weight.columns :].any()


def close(ours: Tensor, theirs: Tensor, bound: float, rounding: float, more: Tensor | float = 0.0) -> None:
    """Assert that entries differ by a bound relative to the largest of their row, and are finite together."""
    finite = theirs.isfinite()
    assert torch.equal(ours.isfinite(), finite)
    theirs = theirs.where(finite, 0)
    largest = theirs.abs().amax(-1, keepdim=True)
    error = (ours.where(finite, 0) - theirs).abs()
    assert (error <= bound * (1 + largest) + rounding * theirs.abs() + more).all(), error.amax()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", [None, *FORMATS])
@pytest.mark.parametrize("inner", [2500, 4500])
def test_long_rows_are_multiplied_in_parts(level, name, inner):
    if not ready(level, torch.bfloat16):
        return
    make = FORMATS["int8" if name is None else name]
    weight, gate = (make(torch.randn(300, inner) / inner**0.5, torch.randn(300)) for _ in range(2))
    x = torch.randn(130, inner).bfloat16()
    rows = rows_of(x, torch.int8 if name is None else torch.bfloat16)
    call = weight, Then(torch.float32 if name is None else torch.bfloat16, "silu")
    found = compiled.linear(rows, *call, gate=gate).output
    wanted = reference.linear(rows, weight, Then(torch.float32, "silu"), gate=gate).output
    close(found.float(), wanted, 3e-5, 0.0 if name is None else 2**-8)
    assert torch.equal(found[:1], compiled.linear(part(rows, slice(1)), *call, gate=gate).output)


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=40)
@given(calls(), st.integers(0, 1000), st.sampled_from([1, 2]))
def test_a_row_has_the_same_bits_whatever_comes_along(level, call, place, threads):
    x, dtype, weight, then, gate, residual = call
    if not ready_for(level, weight, gate):
        return
    torch.set_num_threads(1)
    rows = rows_of(x, dtype)
    every = tensors(compiled.linear(rows, weight, then, gate=gate, residual=residual))
    torch.set_num_threads(threads)
    for length in (1, 7, len(x)):
        of = slice(place % len(x), place % len(x) + length)
        some = None if residual is None else residual[of]
        found = tensors(compiled.linear(part(rows, of), weight, then, gate=gate, residual=some))
        assert all(torch.equal(a[of], b) for a, b in zip(every, found, strict=True))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_has_its_limits(level, name):
    if not ready(level, torch.float32):
        return
    large = [10.0**power for power in range(-45, 39)]
    x = torch.tensor([torch.inf, torch.finfo(torch.float32).max, *large, 0.0, *(f / 10 for f in range(200))])
    x = torch.cat((x, -x, torch.tensor([torch.nan])))
    weight = packed_weight(torch.ones(1, 1), None, torch.float32)
    call = Rows(x[:, None]), weight, Then(torch.float32, name)
    # In float64 no number here is near the largest. Torch's own functions give NaN at -infinity.
    wanted = ACTIVATIONS[name](x.double().clamp(min=-1e300)).float()[:, None]
    for found in (compiled.linear(*call).output, reference.linear(*call).output):
        torch.testing.assert_close(found, wanted, atol=2e-6, rtol=2e-6, equal_nan=True)
    assert wanted[0] == (1 if name == "tanh" else torch.inf)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_of_short_states_is_exact_before_it_is_rounded(level, name):
    """The error is a small part of what the rounding to bf16, and then to 8 bits, may change."""
    start(level)
    x = torch.cat((torch.linspace(-12, 12, 4801), torch.tensor([torch.inf, -torch.inf, torch.nan, 1e-6, -1e-6])))
    # The bias is in float32, so that the rounding of x is not part of the error.
    weight = packed_weight(torch.zeros(len(x), 1), x, torch.int8)
    found = compiled.linear(rows_of(torch.ones(1, 1), torch.int8), weight, Then(torch.bfloat16, name)).output[0]
    wanted = ACTIVATIONS[name](x.double().clamp(min=-1e300))
    finite = wanted.isfinite()
    assert torch.equal(found.isfinite(), finite)
    wanted = wanted.where(finite, 0)
    error = (found.double().where(finite, 0) - wanted).abs()
    rounding = torch.ldexp(torch.tensor(1.0), torch.frexp(wanted).exponent - 9)
    assert (error <= rounding + 2e-5).all(), (error - rounding).max()
    assert error[-2:].max() < (1e-6 if name == "tanh" else 1e-8)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("inner", [1, 64, 1000, 16384])
def test_sums_of_int8_products_are_exact(level, inner):
    start(level)
    extreme = torch.full((2, inner), 127, dtype=torch.int8)
    extreme[1] = -127
    x = torch.cat((extreme, torch.randint(-127, 128, (33, inner), dtype=torch.int8)))
    matrix = torch.cat((extreme, torch.randint(-127, 128, (39, inner), dtype=torch.int8)))
    weight = Weight(pack(matrix), torch.int8, 41, inner, torch.ones(64), None, torch.zeros(64))
    rows = Rows(torch.nn.functional.pad(x, (0, -inner % 64)), torch.ones(35, 2))
    found = compiled.linear(rows, weight, Then(torch.float32)).output
    assert torch.equal(found, (x.double() @ matrix.double().t()).float())


@pytest.mark.parametrize("level", LEVELS)
@given(st.integers(0, 2**31), COUNTS, WIDTHS, st.sampled_from([torch.float32, torch.bfloat16]), st.booleans())
def test_rows_are_quantised_as_in_torch(level, seed, count, width, dtype, positive):
    start(level)
    torch.manual_seed(seed)
    # From denormal numbers to the largest, and rows of zeros.
    x = (torch.randn(count, width) * 10.0 ** torch.randint(-42, 37, (count, 1))).to(dtype)
    x[torch.randint(count, ())] = 0
    x = x.abs() if positive else x
    _, rows = compiled.normed_rows(x, None, output=False, quantized=True)
    entries, scale = quantized_rows(x)
    assert torch.equal(rows.scale, scale)
    assert (rows.data[:, :width].int() - entries.int()).abs().max() <= 1
    assert not rows.data[:, width:].any()
    assert not rows.data[scale[:, 0] == 0].any()
    back = entries * scale[:, :1] + scale[:, 1:]
    assert ((back - x.float()).abs() <= 0.51 * scale[:, :1] + 2 * LEAST).all()


@pytest.mark.parametrize("level", LEVELS)
def test_a_row_that_is_not_finite_becomes_nan_and_leaves_the_others(level):
    start(level)
    x = torch.randn(40, 65)
    weight = packed_weight(torch.randn(33, 65), torch.randn(33), torch.int8)
    then = Then(torch.float32, "gelu", quantized=True)
    clean = compiled.linear(rows_of(x, torch.int8), weight, then)
    for at, value in enumerate(FAULTS.values()):
        x[at * 9, at] = value
    found = compiled.linear(rows_of(x, torch.int8), weight, then)
    faulty = ~x.isfinite().all(-1)
    assert found.output[faulty].isnan().all()
    assert found.rows.scale[faulty, 0].isnan().all()
    assert torch.equal(found.output[~faulty], clean.output[~faulty])
    assert torch.equal(found.rows.data[~faulty], clean.rows.data[~faulty])


@pytest.mark.parametrize("level", LEVELS)
@given(
    st.integers(0, 2**31),
    COUNTS,
    st.integers(1, 5),
    st.sampled_from([2, 6, 16, 32, 34, 64, 128, 256]),
    st.booleans(),
)
def test_norms_and_turned_heads_equal_torch(level, seed, count, heads, size, turned):
    start(level)
    torch.manual_seed(seed)
    norm = None if turned and seed % 3 == 0 else Norm("rms", 1e-3, float(seed % 2), torch.randn(size))
    angles = torch.rand(count, size // 2) * 6
    cosine, sine = (angles.cos(), angles.sin()) if turned else (None, None)
    # Rows with a stride: part of a product that gives more.
    ours = torch.randn(count, heads * size + 5)[:, 3 : 3 + heads * size].unflatten(1, (heads, size))
    theirs = ours.clone()
    compiled.turn_heads(ours, norm, cosine, sine)
    reference.turn_heads(theirs, norm, cosine, sine)
    close(ours, theirs, 1e-5, 0.0)


@pytest.mark.parametrize("level", LEVELS)
def test_no_rows_give_no_rows(level):
    start(level)
    weight = packed_weight(torch.randn(33, 65), None, torch.int8)
    rows = rows_of(torch.empty(0, 65), torch.int8)
    found = compiled.linear(rows, weight, Then(torch.bfloat16, "silu", total=True, quantized=True))
    assert found.total.shape == found.output.shape == (0, 33)
    assert found.rows.data.shape == (0, 64)
