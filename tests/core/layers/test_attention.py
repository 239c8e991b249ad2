"""Attention over spans against one dense attention with a mask."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from grating_core.kernels.operands import Seen, Span
from grating_core.layers.attention import attend, ragged_attention
from grating_core.layers.keys_values import KeysValues
from grating_core.layers.spec import LayerSpec, Norm

HEADS, SIZE = 2, 8
States = tuple[Tensor, Tensor, Tensor]
SPEC = LayerSpec(
    width=16, heads=HEADS, key_heads=HEADS, head_size=SIZE, inner=4, norm=Norm("layer", 1e-5), activation="gelu",
    gated=False, scaling=SIZE**-0.5,
)  # fmt: skip


def random_states(tokens: int, key_heads: int = HEADS) -> States:
    generator = torch.Generator().manual_seed(tokens)
    query, key, value = torch.randn(3, HEADS, tokens, SIZE, generator=generator).unbind()
    return query, key[:key_heads], value[:key_heads]


def dense_attention(spec: LayerSpec, states: States) -> Tensor:
    """The definition, for one sequence: softmax over all tokens at once, where unseen tokens are masked."""
    query, key, value = states
    groups = HEADS // key.shape[0]
    key, value = key.repeat_interleave(groups, dim=0), value.repeat_interleave(groups, dim=0)
    place = torch.arange(query.shape[1])
    seen = torch.ones(len(place), len(place), dtype=torch.bool)
    if spec.causal:
        seen &= place[:, None] >= place
    if spec.window is not None:
        seen &= (place[:, None] - place).abs() < spec.window
    products = query @ key.transpose(1, 2) * spec.scaling
    if spec.softcap is not None:
        products = spec.softcap * torch.tanh(products / spec.softcap)
    return products.masked_fill(~seen, -torch.inf).softmax(-1) @ value


RULES = {
    "key_heads": st.sampled_from([1, 2]),
    "scaling": st.sampled_from([SIZE**-0.5, 0.3]),
    "window": st.sampled_from([None, 1, 2, 8, 39, 40]),
    "softcap": st.sampled_from([None, 0.5]),
    "causal": st.booleans(),
}


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    fill=st.integers(0, 3),
    rules=st.fixed_dictionaries(RULES),
)
def test_each_sequence_attends_to_itself_and_fill_stays_zero(
    lengths: list[int], fill: int, rules: dict[str, object]
) -> None:
    spec = replace(SPEC, **rules)
    states = random_states(sum(lengths) + fill, spec.key_heads)
    spans, expected, start = [], [], 0
    for length in lengths:
        rows = slice(start, start + length)
        spans.append(Span(start, length, 0, length, start))
        expected.append(dense_attention(spec, tuple(state[:, rows] for state in states)).transpose(0, 1))
        start += length
    output = attended(spec, states, spans)
    torch.testing.assert_close(output[:start], torch.cat(expected), atol=1e-5, rtol=1e-5)
    assert not output[start:].any()


def attended(spec: LayerSpec, states: States, spans: list[Span]) -> Tensor:
    query, key, value = (one.transpose(0, 1).contiguous() for one in states)
    return ragged_attention(spec, query, Seen(key, value), spans)


@given(
    tokens=st.integers(1, 90), cuts=st.lists(st.integers(0, 90), max_size=4), rules=st.fixed_dictionaries(RULES)
)
def test_any_slice_of_a_sequence_attends_as_the_whole_does(
    tokens: int, cuts: list[int], rules: dict[str, object]
) -> None:
    spec = replace(SPEC, **rules)
    query, key, value = states = random_states(tokens, spec.key_heads)
    edges = sorted({0, tokens, *(cut for cut in cuts if cut < tokens)})
    parts = [attend(spec, query[:, start:end], key, value, start) for start, end in pairwise(edges)]
    torch.testing.assert_close(torch.cat(parts, 1), dense_attention(spec, states), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 64, 255, 257, 600])
def test_long_sequences(window: int | None, causal: bool, softcap: float | None) -> None:
    spec = replace(SPEC, key_heads=1, causal=causal, window=window, softcap=softcap)
    query, key, value = states = random_states(870, 1)
    expected = dense_attention(spec, states)
    torch.testing.assert_close(attend(spec, query, key, value, 0), expected, atol=1e-5, rtol=1e-5)
    late = attend(spec, query[:, 270:600], key, value, 270)
    torch.testing.assert_close(late, expected[:, 270:600], atol=1e-5, rtol=1e-5)


def test_bounded_products_of_a_long_sequence_take_little_memory() -> None:
    spec = replace(SPEC, causal=True, softcap=3.0)
    query, key, value = random_states(8192)
    with torch.profiler.profile(profile_memory=True) as profile:
        attend(spec, query[:, -64:], key, value, 8192 - 64)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest <= 64 * 8192 * HEADS * 4


@pytest.mark.parametrize("scaling", [SIZE**-0.5, 0.3])
def test_bfloat16_stays_close_whatever_the_length(scaling: float) -> None:
    spec = replace(SPEC, scaling=scaling)
    for tokens in (30, 1, 512, 7):
        rounded = tuple(state.bfloat16() for state in random_states(tokens))
        expected = dense_attention(spec, tuple(state.float() for state in rounded))
        output = attend(spec, *rounded, 0)
        assert output.dtype == torch.bfloat16
        torch.testing.assert_close(output.float(), expected, atol=0.03, rtol=0.01)


@given(
    pieces=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    key_heads=st.sampled_from([1, 2]),
    window=st.sampled_from([None, 1, 8, 40]),
    softcap=st.sampled_from([None, 0.5]),
)
def test_piece_by_piece_with_the_keys_of_those_before(
    pieces: list[int], key_heads: int, window: int | None, softcap: float | None
) -> None:
    spec = replace(SPEC, key_heads=key_heads, causal=True, window=window, softcap=softcap)
    query, key, value = states = random_states(sum(pieces), key_heads)
    kept = KeysValues(spec, sum(pieces) + 5, dtype=torch.float32, device=torch.device("cpu"))
    outputs = []
    for tokens in pieces:
        new = slice(kept.tokens, kept.tokens + tokens)
        kept.extend(key[:, new].transpose(0, 1), value[:, new].transpose(0, 1))
        seen = kept.key.transpose(0, 1), kept.value.transpose(0, 1)
        outputs.append(attend(spec, query[:, new], *seen, new.start))
    assert kept.tokens == sum(pieces)
    torch.testing.assert_close(torch.cat(outputs, 1), dense_attention(spec, states), atol=1e-5, rtol=1e-5)


def test_a_broken_sequence_stays_alone() -> None:
    states = random_states(15)

    def output() -> Tensor:
        spans = [Span(start, stop - start, 0, stop - start, start) for start, stop in ((0, 4), (4, 10), (10, 15))]
        return attended(SPEC, states, spans)

    sound = output()
    for tensor in states:
        tensor[:, 4:10] = torch.nan
    broken = output()
    assert broken[4:10].isnan().all()
    assert torch.equal(broken[:4], sound[:4])
    assert torch.equal(broken[10:], sound[10:])
