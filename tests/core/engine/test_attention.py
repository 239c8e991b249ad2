"""Packed attention against one dense attention with a mask."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AttentionInterface

from grating_core.engine.attention import (
    CACHED_ATTENTION,
    PACKED_ATTENTION,
    Continuation,
    KeysKept,
    Packing,
    SharedKeys,
    cached_attention,
    packed_attention,
)
from grating_core.engine.kv_cache import KeyValueCache

HEADS, SIZE = 2, 8
States = tuple[Tensor, Tensor, Tensor]
MODULE = torch.nn.Identity()


class Decoder(torch.nn.Identity):
    is_causal = True


CAUSAL = Decoder()


def random_states(tokens: int, key_heads: int = HEADS) -> States:
    generator = torch.Generator().manual_seed(tokens)
    query, key, value = torch.randn(3, 1, HEADS, tokens, SIZE, generator=generator).unbind()
    return query, key[:, :key_heads], value[:, :key_heads]


def dense_attention(
    states: States,
    lengths: tuple[int, ...],
    scaling: float | None,
    window: int | None,
    *,
    prefix: int = 0,
    causal: bool = False,
    softcap: float | None = None,
) -> Tensor:
    """The definition: softmax over all tokens at once, where other sequences and far tokens are masked."""
    query, key, value = states
    groups = HEADS // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    # The prefix is number 0, and seen by all.
    owner = torch.arange(len(lengths) + 1).repeat_interleave(torch.tensor([prefix, *lengths]))
    place = torch.cat([torch.arange(prefix), *(prefix + torch.arange(length) for length in lengths)])
    seen = (owner[:, None] == owner) | (owner == 0)
    if causal:
        seen &= place[:, None] >= place
    if window is not None:
        seen &= (place[:, None] - place).abs() < window
    products = query @ key.transpose(2, 3) * (SIZE**-0.5 if scaling is None else scaling)
    if softcap is not None:
        products = softcap * torch.tanh(products / softcap)
    return (products.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(1, 2)


def attend(states: States, packing: Packing, module: torch.nn.Module = MODULE, **options: object) -> Tensor:
    output, weights = packed_attention(module, *states, None, grating=packing, **options)
    assert weights is None
    return output


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6).map(tuple),
    scaling=st.sampled_from([None, 0.3]),
    window=st.sampled_from([None, 1, 2, 8, 39, 40]),
)
def test_each_sequence_attends_to_itself(
    lengths: tuple[int, ...], scaling: float | None, window: int | None
) -> None:
    states = random_states(sum(lengths))
    output = attend(states, Packing(lengths), scaling=scaling, sliding_window=window)
    torch.testing.assert_close(output, dense_attention(states, lengths, scaling, window), atol=1e-5, rtol=1e-5)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6).map(tuple),
    prefix=st.sampled_from([0, 1, 5, 30]),
    key_heads=st.sampled_from([1, 2]),
    scaling=st.sampled_from([None, 0.3]),
    window=st.sampled_from([None, 1, 2, 8, 39, 40]),
    softcap=st.sampled_from([None, 0.5]),
    split=st.integers(0, 6),
)
def test_decoders_see_what_came_before_and_the_prefix(
    lengths: tuple[int, ...],
    prefix: int,
    key_heads: int,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    split: int,
) -> None:
    """In one chunk or in two, of which only the first has the prefix; whole layers or only the last token."""
    states = random_states(prefix + sum(lengths), key_heads)
    rules = {"scaling": scaling, "sliding_window": window, "softcap": softcap}
    expected = dense_attention(states, lengths, scaling, window, prefix=prefix, causal=True, softcap=softcap)
    boundary = prefix + sum(lengths[:split])
    shared, last_tokens = SharedKeys(), []
    outputs = []
    for part, tokens, first in (
        (lengths[:split], slice(boundary), prefix),
        (lengths[split:], slice(boundary, None), 0),
    ):
        chunk = tuple(state[:, :, tokens] for state in states)
        if not chunk[0].shape[2]:
            continue
        outputs.append(attend(chunk, Packing(part, first, shared), CAUSAL, **rules))
        if part:
            packing = Packing(part, first, shared, keep_keys=True)
            with pytest.raises(KeysKept):
                attend(chunk, packing, CAUSAL, **rules)
            ends = [first + end - 1 for end in accumulate(part)]
            last_tokens.append(attend(tuple(state[:, :, ends] for state in chunk), packing, CAUSAL, **rules))
    torch.testing.assert_close(torch.cat(outputs, 1), expected, atol=1e-5, rtol=1e-5)
    ends = [prefix + end - 1 for end in accumulate(lengths)]
    torch.testing.assert_close(torch.cat(last_tokens, 1), expected[:, ends], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("window", [None, 300])
def test_long_sequences_of_a_decoder(window: int | None, softcap: float | None) -> None:
    prefix, lengths = 270, (600, 1, 255)
    states = random_states(prefix + sum(lengths), 1)
    packing = Packing(lengths, prefix, SharedKeys())
    output = attend(states, packing, CAUSAL, sliding_window=window, softcap=softcap)
    expected = dense_attention(states, lengths, None, window, prefix=prefix, causal=True, softcap=softcap)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [1, 64, 255, 257, 600])
def test_a_window_within_long_sequences(window: int) -> None:
    lengths = (700, 3, 256, 513)
    states = random_states(sum(lengths))
    output = attend(states, Packing(lengths), sliding_window=window)
    torch.testing.assert_close(output, dense_attention(states, lengths, None, window), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scaling", [None, 0.3])
def test_bfloat16_stays_close_whatever_the_length(scaling: float | None) -> None:
    lengths = (30, 1, 512, 7)
    rounded = tuple(state.bfloat16() for state in random_states(sum(lengths)))
    expected = dense_attention(tuple(state.float() for state in rounded), lengths, scaling, None)
    output = attend(rounded, Packing(lengths), scaling=scaling)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, atol=0.03, rtol=0.01)


@pytest.mark.parametrize("window", [None, 4])
def test_scoring_positions_attend_to_the_keys_put_aside(window: int | None) -> None:
    lengths = (5, 1, 12)
    query, key, value = random_states(sum(lengths))
    packing = Packing(lengths, keep_keys=True)
    with pytest.raises(KeysKept):
        attend((query, key, value), packing, sliding_window=window)
    first = [0, 5, 6]
    few = (query[:, :, first], key[:, :, first], value[:, :, first])
    whole = dense_attention((query, key, value), lengths, None, window)
    torch.testing.assert_close(attend(few, packing, sliding_window=window), whole[:, first], atol=1e-5, rtol=1e-5)


@given(
    pieces=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    key_heads=st.sampled_from([1, 2]),
    scaling=st.sampled_from([None, 0.3]),
    window=st.sampled_from([None, 1, 8, 40]),
    softcap=st.sampled_from([None, 0.5]),
    fill=st.integers(0, 3),
)
def test_piece_by_piece_with_the_keys_of_those_before(
    pieces: list[int],
    key_heads: int,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    fill: int,
) -> None:
    states = random_states(sum(pieces), key_heads)
    cache = KeyValueCache(2, key_heads, SIZE, sum(pieces) + 5, dtype=torch.float32, device=torch.device("cpu"))
    module = torch.nn.Identity()
    module.layer_idx = 1
    rules = {"scaling": scaling, "sliding_window": window, "softcap": softcap}
    outputs = []
    for end, tokens in zip(accumulate(pieces), pieces, strict=True):
        # Fill of any content: nobody may look at it.
        chunk = [torch.nn.functional.pad(s[:, :, end - tokens : end], (0, 0, 0, fill), value=7.0) for s in states]
        output, weights = cached_attention(module, *chunk, None, grating=Continuation(cache, tokens), **rules)
        assert weights is None
        assert not output[:, tokens:].any()
        outputs.append(output[:, :tokens])
        assert cache.tokens == end
    expected = dense_attention(states, (sum(pieces),), scaling, window, causal=True, softcap=softcap)
    torch.testing.assert_close(torch.cat(outputs, 1), expected, atol=1e-5, rtol=1e-5)


def test_a_broken_sequence_stays_alone() -> None:
    lengths = (4, 6, 5)
    states = random_states(15)
    sound = attend(states, Packing(lengths))
    for tensor in states:
        tensor[:, :, 4:10] = torch.nan
    output = attend(states, Packing(lengths))
    assert output[:, 4:10].isnan().all()
    assert torch.equal(output[:, :4], sound[:, :4])
    assert torch.equal(output[:, 10:], sound[:, 10:])


def test_transformers_knows_it_by_name() -> None:
    assert AttentionInterface()[PACKED_ATTENTION] is packed_attention
    assert AttentionInterface()[CACHED_ATTENTION] is cached_attention
