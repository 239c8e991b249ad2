"""Whole layers against those of transformers, with what transformers' own models gave them."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedModel,
)
from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

from grating_core.layers.layer import finished, keys_and_values, positions, prepared, queries
from grating_core.layers.linear import Weights
from grating_core.layers.rotary import Angles, angles
from grating_core.layers.spec import LayerSpec, Relative
from grating_core.models.directory import describe
from grating_core.models.families import find_family
from grating_core.models.layout import layer_by_role
from tests.core.conftest import DEBERTA, DECODER, FAMILIES, SIZES, WINDOW, randomise

MINICPM = {"scale_depth": 1.4, "scale_emb": 3, "start_layer": 2}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    **FAMILIES,
    "bert-relu": lambda: BertForSequenceClassification(BertConfig(**SIZES, hidden_act="relu")),
    **{
        f"deberta-{name}": lambda changes=changes: DebertaV2ForSequenceClassification(
            DebertaV2Config(**SIZES, **(DEBERTA | changes))
        )
        for name, changes in {
            "c2p": {"pos_att_type": ["c2p"]},
            "p2c": {"pos_att_type": ["p2c"], "share_att_key": False},
            "own-maps": {"share_att_key": False, "position_buckets": 32, "max_relative_positions": -1},
            "without-products": {"pos_att_type": None, "norm_rel_ebd": "none"},
            "not-relative": {"relative_attention": False},
        }.items()
    },
    "llama-biases": lambda: LlamaForSequenceClassification(
        LlamaConfig(**SIZES, **DECODER, attention_bias=True, mlp_bias=True)
    ),
    "modernbert-biases": lambda: ModernBertForSequenceClassification(
        ModernBertConfig(
            **{**SIZES, "pad_token_id": 0}, local_attention=16, norm_bias=True, attention_bias=True, mlp_bias=True
        )
    ),
    "minicpm": lambda: GraniteForCausalLM(
        GraniteConfig(
            **SIZES, num_key_value_heads=2, embedding_multiplier=3, attention_multiplier=8**-0.5,
            residual_multiplier=1.4 / 5**0.5,
        )
    ),
}  # fmt: skip


Places = tuple[Tensor | None, Tensor | None]
"""The keys and the queries of relative positions."""


class Layer:
    """A layer of transformers' model, what it was given and gave, and the same layer by spec and roles."""

    def __init__(
        self, spec: LayerSpec, weights: Weights, table: Tensor | None, given: Tensor, gave: Tensor
    ) -> None:
        self.spec, self.weights, self.table, self.given, self.gave = spec, weights, table, given, gave

    def in_steps(self, ranges: list[slice], dtype: torch.dtype = torch.float32) -> Tensor:
        """What the layer gives when the steps run over ranges of tokens."""
        hidden = self.given.to(dtype)
        weights = {name: weight.to(dtype) for name, weight in self.weights.items()}
        keys, values = zip(
            *(keys_and_values(self.spec, weights, *self._prepared(weights, hidden, part)) for part in ranges),
            strict=True,
        )
        key, value = torch.cat(keys), torch.cat(values)
        places: Places = (None, None)
        if self.spec.relative is not None:
            assert self.table is not None
            places = positions(self.spec, weights, self.table.to(dtype))
        output = []
        for part in ranges:
            query = queries(self.spec, weights, *self._prepared(weights, hidden, part))
            attended = attend_plainly(self.spec, query, key, value, part.start, places)
            output.append(finished(self.spec, weights, hidden[part], attended))
        return torch.cat(output)

    def _prepared(self, weights: Weights, hidden: Tensor, part: slice) -> tuple[Tensor, Angles | None]:
        rotary = self.spec.rotary
        by = None if rotary is None else angles(rotary, torch.arange(part.start, part.stop), hidden.dtype)
        return prepared(self.spec, weights, hidden[part]), by


def attend_plainly(
    spec: LayerSpec, query: Tensor, key: Tensor, value: Tensor, first: int, places: Places = (None, None)
) -> Tensor:
    """What the spec says of attention, with all products in memory: ``[T, heads, head size]``."""
    group = spec.heads // spec.key_heads
    query, key, value = (states.transpose(0, 1) for states in (query, key, value))
    scores = query @ key.repeat_interleave(group, 0).transpose(1, 2) * spec.scaling
    if spec.relative is not None:
        rows = rows_by_transformers(spec.relative, key.shape[1])[first : first + query.shape[1]]
        if places[0] is not None:
            scores += torch.einsum("hqd,qkhd->hqk", query, places[0][rows]) * spec.scaling
        if places[1] is not None:
            scores += torch.einsum("hkd,qkhd->hqk", key, places[1][rows]) * spec.scaling
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    distance = torch.arange(first, first + query.shape[1])[:, None] - torch.arange(key.shape[1])
    hidden = distance.abs() >= (spec.window or WINDOW + 1)
    if spec.causal:
        hidden |= distance < 0
    shares = scores.float().masked_fill(hidden, -torch.inf).softmax(-1).to(value.dtype)
    return (shares @ value.repeat_interleave(group, 0)).transpose(0, 1)


def rows_by_transformers(relative: Relative, tokens: int) -> Tensor:
    """The row of the table of positions for each query and key: ``[T, T]``."""
    states = torch.empty(1, tokens, 1)
    buckets = relative.span if relative.buckets else -1
    rows = build_relative_position(states, states, bucket_size=buckets, max_position=relative.farthest)[0]
    return (rows + relative.span).clamp(0, 2 * relative.span - 1)


@torch.inference_mode()
def layers_of(kind: str, tokens: int, dtype: torch.dtype = torch.float32) -> list[Layer]:
    """The layers of a model with random weights, after one of its own requests of so many tokens."""
    model = randomise(MODELS[kind]()).to(dtype).eval()
    model.set_attn_implementation("eager")
    stated = model.config.to_dict()
    family = find_family([type(model).__name__ if kind != "minicpm" else "LayerWiseMiniCPMForCausalLM"])
    if kind == "minicpm":  # Granite has the same layers, and other names for the factors
        stated = {name: value for name, value in stated.items() if name in family.defaults} | MINICPM
    spec = describe(Path("config.json"), stated, family).spec
    modules = list(model.get_submodule(family.layers))
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, arguments: tuple[Tensor], named: dict[str, Tensor], output: object) -> None:
        given = arguments[0] if arguments else named["hidden_states"]
        gave = output[0] if isinstance(output, tuple) else output
        assert isinstance(gave, Tensor)
        seen.append((given[0].clone(), gave[0].clone()))

    for module in modules:
        module.register_forward_hook(keep, with_kwargs=True)
    model(input_ids=torch.randint(3, SIZES["vocab_size"], (1, tokens)))
    stored = model.state_dict()
    table = (
        model.deberta.encoder.get_rel_embedding()
        if isinstance(model, DebertaV2ForSequenceClassification)
        else None
    )
    return [
        Layer(layer, layer_by_role(family, layer, number, stored), table, *passed)
        for number, (layer, passed) in enumerate(zip(spec.layers, seen, strict=True), 1)
    ]


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Within 1e-5 of a state's usual size, which in some decoders is far above 1."""
    torch.testing.assert_close(found, expected, atol=1e-5 * max(1.0, float(expected.std(correction=0))), rtol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("tokens", [1, 2, 23, WINDOW])
@torch.inference_mode()
def test_a_layer_gives_what_that_of_transformers_gives(kind: str, tokens: int) -> None:
    layers = layers_of(kind, tokens)
    assert len(layers) == SIZES["num_hidden_layers"]
    for layer in layers:
        before = layer.given.clone()
        assert_close(layer.in_steps([slice(0, tokens)]), layer.gave)
        assert torch.equal(layer.given, before)


@pytest.mark.parametrize("kind", MODELS)
@torch.inference_mode()
def test_ranges_of_tokens_give_what_all_tokens_give(kind: str) -> None:
    ends = sorted(random.sample(range(1, WINDOW), 4))
    ranges = [slice(start, stop) for start, stop in zip([0, *ends], [*ends, WINDOW], strict=True)]
    for layer in layers_of(kind, WINDOW):
        assert_close(layer.in_steps(ranges), layer.gave)


@pytest.mark.parametrize("kind", MODELS)
@torch.inference_mode()
def test_in_bfloat16_a_layer_errs_no_more_than_that_of_transformers(kind: str) -> None:
    for layer in layers_of(kind, WINDOW, torch.bfloat16):
        ranges = [slice(0, WINDOW)]
        exact = layer.in_steps(ranges)
        error = (layer.in_steps(ranges, torch.bfloat16) - exact).abs().mean()
        assert 0 < error < 1.2 * (layer.gave - exact).abs().mean()
