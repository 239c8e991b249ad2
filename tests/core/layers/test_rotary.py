"""Rotary positions against transformers' tables and its turning."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from grating_core.layers.rotary import angles, rotated
from grating_core.layers.spec import Rotary

CONFIG = LlamaConfig(hidden_size=48, num_attention_heads=4, max_position_embeddings=4096)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("positions", [[0], [17], [*range(50)], [3, 0, 4095, 7, 7]])
def test_states_are_turned_as_transformers_turns_them(
    positions: list[int], dtype: torch.dtype, tolerance: float
) -> None:
    table = LlamaRotaryEmbedding(CONFIG)
    places = torch.tensor(positions)
    states = torch.randn(len(positions), 4, 12).to(dtype).transpose(0, 1)  # as a linear map gives them
    expected, _ = apply_rotary_pos_emb(states[None], states[None], *table(states, places[None]))
    by = angles(Rotary(tuple(table.inv_freq.tolist())), places, dtype)
    before = states.clone()
    found = rotated(states, by)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected[0], atol=tolerance, rtol=tolerance)
    assert torch.equal(states, before)


def test_a_scale_lengthens_what_is_turned() -> None:
    table, places = LlamaRotaryEmbedding(CONFIG), torch.arange(9)
    states = torch.randn(2, 9, 12)
    turned = [
        rotated(states, angles(Rotary(tuple(table.inv_freq.tolist()), scale), places, torch.float32))
        for scale in (1.0, 1.3)
    ]
    torch.testing.assert_close(turned[1], 1.3 * turned[0])


def test_angles_of_some_tokens_are_those_of_all_at_their_places() -> None:
    rotary = Rotary((1.0, 0.5, 0.01))
    whole = angles(rotary, torch.arange(20), torch.float32)
    for places in (slice(3, 9), torch.tensor([5, 5, 0])):
        part = angles(rotary, torch.arange(20)[places], torch.float32)
        for one, other in zip(whole.at(places), part, strict=True):
            assert torch.equal(one, other)
