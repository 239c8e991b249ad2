"""Rotary positions against transformers' own: the numbers of every scaling, the angles, and the turning."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from grating_core.layers.rotary import angles, dynamic, linear, llama3, plain, rotated, yarn, yarn_scale
from grating_core.layers.spec import Rotary


def made(kind: str, size: int, theta: float) -> tuple[Rotary, dict[str, Any]]:
    """Our rotary positions, and what a configuration says for the same; numbers as real models have them."""
    if kind == "default":
        return plain(size, theta), {}
    if kind == "linear":
        return linear(size, theta, factor=2.5), {"factor": 2.5}
    if kind == "dynamic":
        return dynamic(size, theta, factor=1.7, window=40960), {"factor": 1.7}
    if kind == "llama3":
        rope = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        return llama3(size, theta, factor=32.0, low=1.0, high=4.0, window=8192), rope
    scale = yarn_scale(4.0)
    found = yarn(size, theta, factor=4.0, window=8192, fast=32, slow=1, whole=True, scale=scale)
    return found, {"factor": 4.0}


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0, 1_000_000])
@pytest.mark.parametrize("size", [12, 64, 128, 256])
@pytest.mark.parametrize("kind", ["default", "linear", "dynamic", "yarn", "llama3"])
def test_frequencies_angles_and_turning_are_those_of_transformers(kind: str, size: int, theta: float) -> None:
    ours, rope = made(kind, size, theta)
    rope |= {"rope_type": kind, "rope_theta": theta, "original_max_position_embeddings": 8192}
    config = LlamaConfig(head_dim=size, max_position_embeddings=40960, rope_parameters=rope)
    theirs = LlamaRotaryEmbedding(config)
    assert ours.frequencies == tuple(theirs.inv_freq.tolist())
    assert ours.scale == theirs.attention_scaling

    positions = torch.randint(0, 40960, (7,))
    states = torch.randn(3, 7, size)
    for dtype in (torch.float32, torch.bfloat16):
        found = angles(ours, positions, dtype)
        cosine, sine = theirs(states.to(dtype), positions[None])
        assert torch.equal(torch.cat((found.cosine, found.cosine), 1), cosine[0])
        assert torch.equal(found.sine, sine[0, :, : size // 2])
    expected, _ = apply_rotary_pos_emb(states[None], states[None], *theirs(states, positions[None]))
    turned = rotated(states.transpose(0, 1), angles(ours, positions, torch.float32))
    assert torch.allclose(turned.transpose(0, 1), expected[0], atol=1e-5)


def test_turning_by_a_distance_depends_on_the_distance_only() -> None:
    rotary, states = plain(64, 10_000.0), torch.randn(1, 1, 64)
    products = []
    for start in (0, 1000):
        near, far = (
            rotated(states.clone(), angles(rotary, torch.tensor([start + distance]), torch.float32))
            for distance in (3, 20)
        )
        products.append(float((near * far).sum()))
    assert products[0] == pytest.approx(products[1], abs=1e-2)
    assert products[0] != pytest.approx(float((states * states).sum()), abs=1e-2)


def test_in_bfloat16_states_as_a_linear_map_gives_them_are_turned_and_stay() -> None:
    ours, states = plain(12, 10_000.0), torch.randn(50, 4, 12).bfloat16()
    before, positions = states.clone(), torch.randint(0, 4096, (50,))
    expected = rotated(states.float(), angles(ours, positions, torch.float32))
    torch.testing.assert_close(
        rotated(states, angles(ours, positions, torch.bfloat16)).float(), expected, atol=0.03, rtol=0.03
    )
    assert torch.equal(states, before)


def test_angles_of_some_tokens_are_those_of_all_at_their_places() -> None:
    whole = angles(plain(6, 10_000.0), torch.arange(20), torch.float32)
    for places in (slice(3, 9), torch.tensor([5, 5, 0])):
        part = angles(plain(6, 10_000.0), torch.arange(20)[places], torch.float32)
        for one, other in zip(whole.at(places), part, strict=True):
            assert torch.equal(one, other)
