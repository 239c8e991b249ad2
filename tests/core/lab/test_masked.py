import random

import pytest
import torch
from torch.nn.functional import silu
from transformers import LlamaConfig, Phi3Config, Starcoder2Config
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer
from transformers.models.starcoder2.modeling_starcoder2 import Starcoder2DecoderLayer

from benchmarks.perplexity import baseline_shares, make_mlp
from grating_core.columns.masks import Shares, keep_largest, kept
from grating_core.errors import UnsupportedModelError
from grating_core.lab.masked import MaskedMlp, find_gated_mlp

MLP = LlamaMLP(LlamaConfig(hidden_size=24, intermediate_size=40, num_attention_heads=2)).requires_grad_(False)
HIDDEN = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))


def by_hand(hidden: torch.Tensor, shares: Shares, method: str) -> torch.Tensor:
    """The definitions, one token after the other."""
    tokens = []
    for token in hidden.flatten(0, 1):
        x = keep_largest(token, shares.inputs) if method == "dip" else token
        gate, up = silu(MLP.gate_proj.weight @ x), MLP.up_proj.weight @ x
        ranked = {"dip": gate * up, "glu": gate * up, "gate": gate, "up": up}[method]
        chosen = ranked.abs().argsort(descending=True)[: kept(40, shares.products)]
        tokens.append(MLP.down_proj.weight[:, chosen] @ (gate * up)[chosen])
    return torch.stack(tokens).view(hidden.shape)


@pytest.mark.parametrize("method", ["dip", "glu", "gate", "up"])
@pytest.mark.parametrize("shares", [Shares(1.0, 1.0), Shares(0.5, 0.3), Shares(0.01, 0.01)])
def test_methods_follow_their_definitions(method: str, shares: Shares) -> None:
    found = make_mlp(method)(MLP, shares)(HIDDEN)  # type: ignore[arg-type]
    torch.testing.assert_close(found, by_hand(HIDDEN, shares, method))


def test_keeping_everything_is_the_dense_mlp() -> None:
    assert torch.equal(MaskedMlp(MLP, Shares(1.0, 1.0))(HIDDEN), MLP(HIDDEN))


@pytest.mark.parametrize("method", ["glu", "gate", "up"])
def test_baselines_use_as_many_weights_as_the_density_says(method: str) -> None:
    for density in (0.4, 0.5, 0.7, 0.9, 1.0):
        shares = baseline_shares(method, density)  # type: ignore[arg-type]
        if shares is None:
            assert method == "glu"
            assert density <= 2 / 3
        else:
            # W_u and W_g whole; or one of them, with the columns of the two others that are kept.
            used = 2 + shares.products if method == "glu" else 1 + 2 * shares.products
            assert used / 3 == pytest.approx(density)


def test_gradients_reach_what_is_kept() -> None:
    chance = random.Random(0)
    hidden = torch.tensor([[chance.gauss(0, 1) for _ in range(24)]], requires_grad=True)
    MaskedMlp(MLP, Shares(0.5, 0.5))(hidden).sum().backward()
    assert hidden.grad is not None
    assert (hidden.grad[0] != 0).sum() == 12


def test_a_layer_without_a_gated_mlp_is_refused() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    layer = Starcoder2DecoderLayer(Starcoder2Config(**sizes), 0)
    with pytest.raises(UnsupportedModelError, match=r"gated MLPs.*a Starcoder2DecoderLayer has none"):
        find_gated_mlp(layer)


def test_a_layer_whose_matrices_are_one_is_refused() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    layer = Phi3DecoderLayer(Phi3Config(**sizes, pad_token_id=0), 0)
    with pytest.raises(UnsupportedModelError, match=r"a Phi3DecoderLayer has one matrix.*neither distilled"):
        find_gated_mlp(layer)
