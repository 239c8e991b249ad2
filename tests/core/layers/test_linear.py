"""Linear maps and norms against torch's and transformers' modules."""

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from grating_core.layers.linear import linear, normed
from grating_core.layers.spec import Norm

NORMS = {
    "layer": (lambda width: nn.LayerNorm(width, eps=1e-12), Norm("layer", 1e-12)),
    "layer without bias": (lambda width: nn.LayerNorm(width, eps=1e-5, bias=False), Norm("layer", 1e-5)),
    "llama": (lambda width: LlamaRMSNorm(width, eps=1e-6), Norm("rms", 1e-6)),
    "qwen3": (lambda width: Qwen3RMSNorm(width, eps=1e-5), Norm("rms", 1e-5)),
    "gemma": (lambda width: GemmaRMSNorm(width, eps=1e-6), Norm("rms", 1e-6, 1.0)),
    "gemma2": (lambda width: Gemma2RMSNorm(width, eps=1e-6), Norm("rms", 1e-6, 1.0)),
}


def weights_of(module: nn.Module, role: str) -> dict[str, Tensor]:
    """The module's weights by role, random ones: some begin as zeros or ones, which hide much."""
    for weight in module.parameters():
        nn.init.normal_(weight.requires_grad_(False), mean=0.5)
    return {f"{role}.{name}": weight for name, weight in module.named_parameters()}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("width", [8, 33, 384])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_norms_are_those_of_transformers(kind: str, width: int, size: float) -> None:
    make, norm = NORMS[kind]
    module = make(width)
    weights = weights_of(module, "some_norm")
    for tokens in (1, 2, 57):
        states = size * torch.randn(tokens, width)
        before = states.clone()
        torch.testing.assert_close(
            normed(states, weights, "some_norm", norm), module(states), atol=1e-5, rtol=1e-5
        )
        assert torch.equal(states, before)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_in_16_bits_err_no_more_than_those_of_transformers(kind: str, dtype: torch.dtype) -> None:
    make, norm = NORMS[kind]
    module = make(96)
    weights = weights_of(module, "some_norm")
    states = (2 * torch.randn(200, 96)).to(dtype)
    exact = module(states.float())
    expected = module.to(dtype)(states)
    found = normed(states, {name: weight.to(dtype) for name, weight in weights.items()}, "some_norm", norm)
    assert found.dtype == dtype
    assert (found.float() - exact).abs().mean() < 1.1 * (expected.float() - exact).abs().mean()


def test_a_norm_of_heads_looks_at_each_head_alone() -> None:
    module = Qwen3RMSNorm(16)
    weights = weights_of(module, "query_norm")
    heads = torch.randn(5, 4, 16)  # as a linear map gives them: tokens, heads, entries
    found = normed(heads.transpose(0, 1), weights, "query_norm", Norm("rms", 1e-6))
    torch.testing.assert_close(found, module(heads).transpose(0, 1), atol=1e-5, rtol=1e-5)


def test_states_of_zeros_stay_finite() -> None:
    for make, norm in NORMS.values():
        module = make(24)
        found = normed(torch.zeros(3, 24), weights_of(module, "n"), "n", norm)
        torch.testing.assert_close(found, module(torch.zeros(3, 24)))


def test_without_a_weight_the_states_pass_unchanged() -> None:
    states = torch.randn(3, 24)
    assert normed(states, {"other_norm.weight": torch.ones(24)}, "some_norm", Norm("rms", 1e-6)) is states


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_map_is_that_of_torch(biased: bool, dtype: torch.dtype) -> None:
    module = nn.Linear(40, 24, bias=biased)
    weights = {name: weight.to(dtype) for name, weight in weights_of(module, "down").items()}
    for tokens in (1, 2, 57):
        states = torch.randn(tokens, 40).to(dtype)
        assert torch.equal(linear(states, weights, "down"), module.to(dtype)(states))
