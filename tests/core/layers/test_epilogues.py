"""Epilogues against the product and then activation, factors or sum, in float64."""

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from grating_core.kernels.activations import ACTIVATIONS
from grating_core.layers.epilogues import activated, added, multiplied

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.004}
TOKENS = (0, 1, 2, 31, 150)


def weights(biased: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    found = {"up.weight": torch.randn(56, 40) / 6, **({"up.bias": torch.randn(56)} if biased else {})}
    return {name: weight.to(dtype) for name, weight in found.items()}


def product(states: Tensor, by: dict[str, Tensor]) -> Tensor:
    return states.double() @ by["up.weight"].double().T + by.get("up.bias", torch.zeros(56)).double()


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, atol=3 * TOLERANCES[dtype], rtol=TOLERANCES[dtype])


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_product_is_activated(name: str, biased: bool, dtype: torch.dtype) -> None:
    by = weights(biased, dtype)
    for tokens in TOKENS:
        states = (3 * torch.randn(tokens, 40)).to(dtype)
        before = states.clone()
        assert_near(activated(states, by, "up", name), ACT2FN[name](product(states, by)), dtype)
        assert torch.equal(states, before)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_product_is_multiplied(biased: bool, dtype: torch.dtype) -> None:
    by = weights(biased, dtype)
    for tokens in TOKENS:
        states, factors = torch.randn(tokens, 40).to(dtype), torch.randn(tokens, 56).to(dtype)
        assert_near(multiplied(states, by, "up", factors.clone()), product(states, by) * factors.double(), dtype)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("factor", [1.0, 0.37])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_product_is_added(biased: bool, factor: float, dtype: torch.dtype) -> None:
    by = weights(biased, dtype)
    for tokens in TOKENS:
        states, total = torch.randn(tokens, 40).to(dtype), torch.randn(tokens, 56).to(dtype)
        before = total.clone()
        expected = before.double() + factor * product(states, by)
        assert_near(added(states, by, "up", total, factor), expected, dtype)
        assert torch.equal(total, before)
