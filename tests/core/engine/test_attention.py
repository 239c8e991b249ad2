"""Packed attention against one dense attention with a mask."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AttentionInterface

from grating_core.engine.attention import PACKED_ATTENTION, KeysKept, Packing, packed_attention

HEADS, SIZE = 2, 8
MODULE = torch.nn.Identity()


def random_states(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    query, key, value = torch.randn(3, 1, HEADS, tokens, SIZE, generator=generator).unbind()
    return query, key, value


def dense_attention(
    states: tuple[Tensor, Tensor, Tensor], lengths: tuple[int, ...], scaling: float | None, window: int | None
) -> Tensor:
    """The definition: softmax over all tokens at once, where other sequences and far tokens are masked."""
    query, key, value = states
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    place = torch.arange(sum(lengths))
    seen = owner[:, None] == owner
    if window is not None:
        seen &= (place[:, None] - place).abs() < window
    products = query @ key.transpose(2, 3) * (SIZE**-0.5 if scaling is None else scaling)
    return (products.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(1, 2)


def attend(states: tuple[Tensor, Tensor, Tensor], packing: Packing, **options: object) -> Tensor:
    output, weights = packed_attention(MODULE, *states, None, packing=packing, **options)
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
