"""The compiled attention against its definition, at every level that this processor has."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grating_core.kernels.compiled import attention
from grating_core.kernels.operands import Positions, Seen, Span

pytestmark = pytest.mark.usefixtures("level")
BOUND = {torch.float32: 2e-5, torch.bfloat16: 0.04}


@dataclass(frozen=True)
class Rules:
    heads: int = 4
    key_heads: int = 4
    size: int = 32
    causal: bool = False
    window: int | None = None
    softcap: float | None = None
    scaling: float = 0.2
    places: str = (
        ""  # which products with relative positions there are: of queries with keys, and of keys with queries
    )

    @property
    def positions(self) -> Positions | None:
        """Keys and queries of positions: far distances share a row, and rows lie in no order."""
        if not self.places:
            return None
        generator = torch.Generator().manual_seed(7)
        key, query = torch.randn(2, 90, self.heads, self.size, generator=generator)
        rows = torch.randperm(90, generator=generator)[torch.arange(-1200, 1201).clamp(-44, 45) + 44]
        return Positions(key if "k" in self.places else None, query if "q" in self.places else None, rows.int())


class Piece(NamedTuple):
    """A piece is consecutive queries of a sequence, whose first keys may lie elsewhere."""

    keys: int
    first: int = 0
    length: int | None = None
    shared: int = 0

    @property
    def queries(self) -> int:
        return self.keys - self.first if self.length is None else self.length


class Given(NamedTuple):
    """This class holds the states of one sequence, for all its tokens: ``[keys, heads, size]``."""

    query: Tensor
    key: Tensor
    value: Tensor


def random_states(rules: Rules, keys: int, dtype: torch.dtype, seed: int = 0) -> Given:
    generator = torch.Generator().manual_seed(seed * 10_000 + keys)
    query = torch.randn(keys, rules.heads, rules.size, generator=generator)
    key, value = torch.randn(2, keys, rules.key_heads, rules.size, generator=generator)
    return Given(query.to(dtype), key.to(dtype), value.to(dtype))


def by_definition(rules: Rules, states: Given) -> Tensor:
    """Return the attention of one sequence in float64, ``[keys, heads, size]``.

    Where a query sees a value that is not finite, the entry is NaN.
    """
    groups = rules.heads // rules.key_heads
    query, key, value = (part.double().transpose(0, 1) for part in states)
    products = query @ key.repeat_interleave(groups, 0).mT
    place = torch.arange(len(states.key))
    distance = place[:, None] - place
    if (positions := rules.positions) is not None:
        rows = positions.rows[distance + positions.reach].long().expand(rules.heads, -1, -1)
        met = [None if one is None else one.to(states.key.dtype).double() for one in positions[:2]]
        if met[0] is not None:
            products += (query @ met[0].permute(1, 2, 0)).gather(-1, rows)
        if met[1] is not None:
            products += (key @ met[1].permute(1, 2, 0)).gather(-1, rows.mT).mT
    products *= rules.scaling
    if rules.softcap is not None:
        products = rules.softcap * torch.tanh(products / rules.softcap)
    hidden = (distance < 0) & rules.causal
    if rules.window is not None:
        hidden |= distance.abs() >= rules.window
    weights = products.masked_fill(hidden, -torch.inf).softmax(-1)
    # A hidden key has a weight of zero, whose product with infinity or NaN would be NaN.
    finite = value.isfinite()
    spoiled = (~hidden).double() @ (~finite).double() > 0
    attended = weights @ value.where(finite, 0).repeat_interleave(groups, 0)
    return attended.masked_fill(spoiled.repeat_interleave(groups, 0), torch.nan).transpose(0, 1)


def sharing(pieces: Sequence[Piece], states: Sequence[Given]) -> list[Piece]:
    """Let pieces that share keys share those of the first of them, if they have so many; the states change."""
    count, first = next(
        ((piece.shared, one) for piece, one in zip(pieces, states, strict=True) if piece.shared), (0, None)
    )
    found = []
    for piece, one in zip(pieces, states, strict=True):
        shared = count if piece.shared and count <= piece.keys else 0
        if first is not None and shared:
            one.key[:shared], one.value[:shared] = first.key[:shared].clone(), first.value[:shared].clone()
        found.append(piece._replace(shared=shared))
    return found


def attend(rules: Rules, pieces: Sequence[tuple[Piece, Given]]) -> list[Tensor]:
    """Attend with pieces of sequences in one call, and return the output of each, ``[queries, heads, size]``."""
    queries, spans, keys, values, start, place = [], [], [], [], 0, 0
    shared = None
    for piece, states in pieces:
        if piece.shared:
            shared = states.key[: piece.shared].clone(), states.value[: piece.shared].clone()
        own = slice(piece.shared, piece.keys)
        queries.append(states.query[piece.first : piece.first + piece.queries])
        keys.append(states.key[own])
        values.append(states.value[own])
        spans.append(Span(start, piece.queries, piece.first, piece.keys, place, piece.shared))
        start, place = start + piece.queries, place + piece.keys - piece.shared
    positions = rules.positions
    if positions is not None:
        dtype = queries[0].dtype
        key, query = (None if one is None else one.to(dtype) for one in (positions.key, positions.query))
        positions = Positions(key, query, positions.rows)
    output = attention(
        torch.cat(queries),
        Seen(torch.cat(keys), torch.cat(values), shared),
        spans,
        causal=rules.causal,
        scaling=rules.scaling,
        window=rules.window,
        softcap=rules.softcap,
        positions=positions,
    )
    return [output[span.rows] for span in spans]


def whole(rules: Rules, states: Given) -> Tensor:
    return attend(rules, [(Piece(len(states.key)), states)])[0]


@st.composite
def pieces(draw: st.DrawFn) -> Piece:
    keys = draw(st.integers(1, 70) | st.sampled_from([256, 257, 300]))
    first = draw(st.integers(0, keys - 1))
    return Piece(keys, first, draw(st.integers(1, keys - first)), draw(st.integers(0, keys)))


RULES = st.builds(
    Rules,
    heads=st.just(4),
    key_heads=st.sampled_from([1, 2, 4]),
    size=st.sampled_from([8, 31, 32, 40, 64, 80, 96, 128]),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 300),
    softcap=st.sampled_from([None, 0.5, 20.0]),
    scaling=st.sampled_from([0.05, 0.3]),
) | st.builds(
    Rules,
    size=st.sampled_from([8, 31, 32, 64, 80]),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 300),
    softcap=st.sampled_from([None, 20.0]),
    scaling=st.sampled_from([0.05, 0.2]),
    places=st.sampled_from(["k", "q", "kq"]),
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@DTYPES
@settings(max_examples=25)
@given(rules=RULES, batch=st.lists(pieces(), min_size=1, max_size=4))
def test_follows_the_definition(dtype: torch.dtype, rules: Rules, batch: list[Piece]) -> None:
    states = [random_states(rules, piece.keys, dtype, seed) for seed, piece in enumerate(batch)]
    batch = sharing(batch, states)
    for piece, given_, found in zip(
        batch, states, attend(rules, list(zip(batch, states, strict=True))), strict=True
    ):
        expected = by_definition(rules, given_)[piece.first : piece.first + piece.queries]
        torch.testing.assert_close(found.double(), expected, atol=BOUND[dtype], rtol=0)


@DTYPES
@pytest.mark.parametrize(
    "rules",
    [
        Rules(),
        Rules(key_heads=1, size=256, causal=True),
        Rules(key_heads=2, size=80, causal=True, window=40),
        Rules(size=64, window=300, softcap=5.0),
        Rules(size=64, places="kq", scaling=0.07),
        Rules(size=40, places="q", causal=True, window=200, scaling=0.1),
    ],
)
def test_long_sequences_follow_the_definition(dtype: torch.dtype, rules: Rules) -> None:
    states = random_states(rules, 1100, dtype)
    torch.testing.assert_close(
        whole(rules, states).double(), by_definition(rules, states), atol=BOUND[dtype], rtol=0
    )


@DTYPES
@settings(max_examples=20)
@given(rules=RULES, piece=pieces(), other=pieces(), threads=st.integers(1, 3))
def test_a_query_does_not_depend_on_what_is_computed_beside_it(
    dtype: torch.dtype, rules: Rules, piece: Piece, other: Piece, threads: int
) -> None:
    states, others = random_states(rules, piece.keys, dtype), random_states(rules, other.keys, dtype, 1)
    piece, other = sharing([piece, other], [states, others])
    expected = whole(rules, states)[piece.first : piece.first + piece.queries]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = attend(rules, [(other, others), (piece, states), (other, others)])[1]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, expected)


@DTYPES
@pytest.mark.parametrize("rules", [Rules(), Rules(key_heads=2), Rules(causal=True, window=30), Rules(window=9)])
def test_scores_of_any_size_are_computed(dtype: torch.dtype, rules: Rules) -> None:
    rules = replace(rules, scaling=1.0)
    for factor in (0.0, 1e-20, 30.0, 1e4):
        states = random_states(rules, 300, dtype)
        states = Given(states.query * factor, *states[1:])
        expected = by_definition(rules, states)
        # Large scores have rounding errors of their own, which the exponential makes larger.
        bound = BOUND[dtype] if factor < 1 else 0.1
        torch.testing.assert_close(whole(rules, states).double(), expected, atol=bound, rtol=0)


@DTYPES
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "rules", [Rules(), Rules(key_heads=2, causal=True), Rules(softcap=5.0, window=20), Rules(places="kq")]
)
def test_what_is_not_finite_stays_where_it_is(dtype: torch.dtype, poison: float, rules: Rules) -> None:
    states, others = random_states(rules, 70, dtype), random_states(rules, 70, dtype, 1)
    clean = whole(rules, states)
    query = states.query.clone()
    query[40, 1, 3] = poison
    spoiled = Given(*(torch.full_like(part, poison) for part in others))
    found = attend(rules, [(Piece(70), spoiled), (Piece(70), Given(query, *states[1:])), (Piece(70), spoiled)])
    assert not found[0].isfinite().any()
    assert not found[2].isfinite().any()
    changed = torch.zeros_like(clean, dtype=torch.bool)
    changed[40, 1] = True
    assert torch.equal(found[1][~changed], clean[~changed])
    if rules.softcap is None:
        assert found[1][changed].isnan().all()


@DTYPES
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("rules", [Rules(causal=True), Rules(size=31, window=9), Rules(4, 2, 80, True, 20, 5.0)])
def test_a_hidden_value_that_is_not_finite_changes_nothing(
    dtype: torch.dtype, poison: float, rules: Rules
) -> None:
    states = random_states(rules, 300, dtype)
    for place in (5, 40, 41, 290):
        states.value[place, :, place % rules.size] = poison
    expected = by_definition(rules, states)
    assert 0 < expected.isnan().sum() < expected.numel() / 2
    for piece in (Piece(300), Piece(300, 33, 30, shared=41), Piece(300, 290, 1), Piece(300, 288, 1)):
        found = attend(rules, [(piece, states)])[0].double()
        wanted = expected[piece.first : piece.first + piece.queries]
        torch.testing.assert_close(found, wanted, atol=BOUND[dtype], rtol=0, equal_nan=True)


def test_rows_in_no_span_are_zero_and_rows_may_have_any_stride() -> None:
    rules = Rules()
    states = random_states(rules, 20, torch.float32)
    together = torch.cat([part.flatten(1) for part in states], 1)
    shape = rules.heads, rules.size
    query, key, value = (part.unflatten(1, shape) for part in together.split(rules.heads * rules.size, 1))
    into = torch.full((20, *shape), torch.nan)
    found = attention(
        query, Seen(key, value), [Span(2, 16, 0, 16, 2)], causal=False, scaling=rules.scaling, into=into
    )
    assert found is into
    assert not found[:2].any()
    assert not found[18:].any()
    expected = whole(rules, Given(*(part[2:18] for part in states)))
    assert torch.equal(found[2:18], expected)


@DTYPES
def test_small_numbers_stay_what_they_are_outside_of_the_kernel(dtype: torch.dtype) -> None:
    whole(Rules(), random_states(Rules(), 20, dtype))
    assert (torch.full((64,), 1e-38) * 0.01).all()
