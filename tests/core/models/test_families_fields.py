"""Field by field: what a family's spec says is what transformers' configuration and modules say."""

import random
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from grating_core import GratingError, ModelNotFoundError, UnsupportedModelError
from grating_core.kernels.activations import ACTIVATIONS
from grating_core.layers.spec import LayerSpec, Norm
from grating_core.models.directory import describe
from grating_core.models.families import FAMILIES
from grating_core.models.family import Configuration
from grating_core.models.layout import head_names, layer_names, outside_names
from tests.core.bidirectional import LlamaBidirectionalForSequenceClassification

PATH = Path("somewhere", "config.json")
SMALL = {
    "vocab_size": 70, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 24,
    "num_labels": 1, "max_position_embeddings": 64, "pad_token_id": 2,
    "num_key_value_heads": 2,
}  # fmt: skip
DEBERTA = "DebertaV2ForSequenceClassification"
MINICPM = "LayerWiseMiniCPMForCausalLM"
LIGHTWEIGHT = "CostWiseGemmaForCausalLM"
BIDIRECTIONAL = "LlamaBidirectionalForSequenceClassification"
_WRITTEN_OUT = (MINICPM, LIGHTWEIGHT, BIDIRECTIONAL)
KNOWN = [name for name in FAMILIES if name in _WRITTEN_OUT or hasattr(transformers, name)]  # to transformers
FULL, LOCAL = "full_attention", "sliding_attention"
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
          "original_max_position_embeddings": 32, "rope_theta": 500.0}  # fmt: skip
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [4.0, 5.0, 6.0, 7.0]}
ROPES = [
    {"rope_type": "default", "rope_theta": 77.0},
    {"type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 1.7, "rope_theta": 1000},
    {"rope_type": "yarn", "factor": 1.5},
    {"rope_type": "yarn", "factor": 4.0, "truncate": False, "beta_fast": 16, "beta_slow": 2},
    YARN,
    YARN | {"attention_factor": 0.7},
    YARN | {"mscale": 0.707, "mscale_all_dim": 1.4, "rope_theta": 150},
    LLAMA3,
    LONGROPE | {"factor": 4.0},
    LONGROPE | {"original_max_position_embeddings": 16},
    LONGROPE | {"attention_factor": 1.2, "original_max_position_embeddings": 16},
    None,
    {},
]
PHI3_ROPES = [rope for rope in ROPES if not rope or rope.get("rope_type") in ("default", "longrope")]
BY_TYPE = [
    {FULL: {"rope_type": "default", "rope_theta": 5000.0}, LOCAL: {"rope_type": "linear", "factor": 2.0}},
    {FULL: YARN},
    {LOCAL: {"rope_theta": 300.0}},
    None,
]
# Other values than the defaults, for every field that a family knows.
VALUES: dict[str, list[Any]] = {
    "vocab_size": [71], "hidden_size": [48], "num_hidden_layers": [3, 1], "num_attention_heads": [2, 8],
    "intermediate_size": [40], "max_position_embeddings": [128], "type_vocab_size": [1, 3], "pad_token_id": [0, 5],
    "hidden_act": ["relu", "gelu", "gelu_new", "gelu_pytorch_tanh", "silu", "swish"],
    "hidden_activation": ["relu", "gelu", "gelu_pytorch_tanh"], "classifier_activation": ["tanh", "silu"],
    "relative_attention": [True, False], "max_relative_positions": [-1, 0, 50], "position_buckets": [-1, 0, 8, 10],
    "pos_att_type": ["p2c|c2p", "c2p", " P2C ", ["c2p"], ["p2c", "c2p"], [], None], "share_att_key": [True, False],
    "norm_rel_ebd": ["layer_norm", "none", "other | Layer_Norm"], "position_biased_input": [False, True],
    "pooler_hidden_act": ["tanh", "gelu"],
    "layer_norm_eps": [1e-5], "norm_eps": [1e-3], "rms_norm_eps": [1e-5], "num_labels": [1],
    "id2label": [{"0": "a"}, {"0": "no", "1": "yes"}], "problem_type": ["regression", None],
    "embedding_size": [48, 20],
    "norm_bias": [True], "attention_bias": [True], "mlp_bias": [True], "classifier_bias": [True],
    "classifier_pooling": ["cls", "mean"], "local_attention": [16, 17], "global_attn_every_n_layers": [1, 2],
    "layer_types": [[LOCAL, FULL, FULL, LOCAL], [FULL] * 4, None], "global_rope_theta": [9000, 9000.0],
    "local_rope_theta": [700.0], "num_key_value_heads": [1, None], "head_dim": [10, 16],
    "rope_theta": [500.0, 1_000_000], "original_max_position_embeddings": [8],
    "tie_word_embeddings": [True, False],
    "eos_token_id": [7, [3, 4], None], "sliding_window": [5, None], "use_sliding_window": [True],
    "max_window_layers": [0, 2], "query_pre_attn_scalar": [144], "attn_logit_softcapping": [20.0, None],
    "final_logit_softcapping": [10.0, None], "scale_emb": [12, 1.5], "scale_depth": [1.4], "start_layer": [2, 3],
    "embedding_multiplier": [12, 1.5], "attention_multiplier": [0.1], "residual_multiplier": [0.22],
    "logits_scaling": [8, 1.5], "sliding_window_pattern": [1, 2, 3], "rope_local_base_freq": [700.0],
    "pooling": ["cls", "last"], "temperature": [0.5, 2],
}  # fmt: skip


def values(name: str, field: str) -> list[Any]:
    refuses_null = {
        "num_key_value_heads": ("Gemma", "CostWise", "Mistral"),
        "sliding_window": ("Gemma", "CostWise"),
    }
    if field == "head_dim" and name.startswith("Gemma3"):
        return [16]  # transformers makes its norms only for a size of its own
    if name.startswith(refuses_null.get(field, ("no",))):
        return [value for value in VALUES[field] if value is not None]
    if field in ("rope_parameters", "rope_scaling"):
        if name.startswith(("ModernBert", "Gemma3")) and field == "rope_parameters":
            # transformers cannot scale Gemma 3's full attention where other layers alone have rotary positions.
            return BY_TYPE if name.startswith("ModernBert") else [one for one in BY_TYPE if not one or FULL in one]
        return PHI3_ROPES if name.startswith("Phi3") else ROPES
    return VALUES[field]


def small(name: str) -> dict[str, Any]:
    own: dict[str, Any] = {"start_layer": 1, "head_dim": 8, "relative_attention": True}
    return SMALL | {field: value for field, value in own.items() if field in FAMILIES[name].defaults}


def theirs(name: str, stated: dict[str, Any]) -> tuple[PreTrainedConfig, PreTrainedModel]:
    """transformers' configuration and its module without weights. A MiniCPM is a Granite, with other names."""
    stated = deepcopy(stated)  # transformers completes the dictionaries in it
    if name == MINICPM:
        same = {field: value for field, value in stated.items() if not field.startswith(("scale_", "start_"))}
        config = transformers.GraniteConfig(**same)
        config.embedding_multiplier = stated.get("scale_emb", 1)
        config.residual_multiplier = stated.get("scale_depth", 1) / config.num_hidden_layers**0.5
        config.attention_multiplier = (config.hidden_size // config.num_attention_heads) ** -0.5
        made: type[PreTrainedModel] = transformers.GraniteForCausalLM
    elif name == LIGHTWEIGHT:
        made = transformers.Gemma2ForCausalLM
        config = made.config_class.from_dict(stated)
    elif name == BIDIRECTIONAL:
        made = LlamaBidirectionalForSequenceClassification
        config = made.config_class.from_dict(stated)
    else:
        made = getattr(transformers, name)
        # Most configurations take the usual names as well, and none takes all of them.
        config = made.config_class.from_dict(
            {FAMILIES[name].field(field): value for field, value in stated.items()}
        )
    if LOCAL in (getattr(config, "layer_types", None) or ()) and config.sliding_window is None:
        raise ValueError("its attention masks cannot be made")
    with torch.device("meta"):
        return config, made(config)


def same_norm(norm: Norm, module: nn.Module) -> bool:
    eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
    kind = "layer" if isinstance(module, nn.LayerNorm) else "rms"
    return (norm.kind, norm.eps, norm.offset) == (kind, eps, float("Gemma" in type(module).__name__))


def same_activation(name: str, module: Any) -> bool:
    states = torch.linspace(-4, 4, 50)
    return torch.allclose(ACTIVATIONS[name](states.clone()), module(states), atol=1e-6)


def check_encoder_layer(spec: LayerSpec, layer: Any) -> None:
    attention = layer.attention if hasattr(layer, "attention") else layer.attn
    attention = getattr(attention, "self", attention)
    kinds = getattr(attention, "pos_att_type", [])
    heads = getattr(attention, "num_attention_heads", None) or attention.config.num_attention_heads
    assert (spec.heads, spec.key_heads) == (heads, heads)
    assert spec.head_size == (getattr(attention, "attention_head_size", None) or attention.head_dim)
    assert spec.scaling == pytest.approx((spec.head_size * (1 + len(kinds))) ** -0.5)
    assert (spec.causal, spec.softcap, spec.residual) == (False, None, 1)
    assert spec.window == getattr(attention, "sliding_window", None)
    assert spec.norm_behind is hasattr(layer, "attention")
    mlp = layer.mlp.act if hasattr(layer, "mlp") else None
    mlp = mlp or (layer.ffn.activation if hasattr(layer, "ffn") else layer.intermediate.intermediate_act_fn)
    assert same_activation(spec.activation, mlp)

    check_relative(spec, attention, kinds)


def check_relative(spec: LayerSpec, attention: Any, kinds: list[str]) -> None:
    if spec.relative is None:
        assert not kinds or not attention.relative_attention
        return
    whose = "" if attention.share_att_key else "position_"
    assert spec.relative.key == (f"{whose}key" if "c2p" in kinds else None)
    assert spec.relative.query == (f"{whose}query" if "p2c" in kinds else None)
    assert spec.relative.span == attention.pos_ebd_size
    assert spec.relative.buckets is (attention.position_buckets > 0)
    assert spec.relative.farthest == attention.max_relative_positions


def check_decoder_layer(spec: LayerSpec, layer: Any, config: Any) -> None:
    attention = layer.self_attn
    assert (spec.heads, spec.heads // spec.key_heads) == (
        config.num_attention_heads,
        attention.num_key_value_groups,
    )
    assert (spec.head_size, spec.scaling) == (attention.head_dim, attention.scaling)
    assert (spec.causal, spec.gated, spec.norm_behind) == (attention.is_causal, True, False)
    every = config.model_type in ("mistral", "phi3")
    assert spec.window == (config.sliding_window if every else getattr(attention, "sliding_window", None))
    assert spec.softcap == getattr(attention, "attn_logit_softcapping", None)
    assert spec.residual == getattr(layer, "residual_multiplier", 1)
    assert same_activation(spec.activation, getattr(layer.mlp, "act_fn", None) or layer.mlp.activation_fn)


def check_rotary(spec: LayerSpec, module: Any, config: Any, kind: str) -> None:
    rotary = type(module.model.rotary_emb)(config)  # on the CPU, with values
    prefix = f"{kind}_" if hasattr(rotary, f"{kind}_inv_freq") else ""
    assert spec.rotary is not None
    assert spec.rotary.frequencies == tuple(getattr(rotary, f"{prefix}inv_freq").tolist())
    assert spec.rotary.scale == getattr(rotary, f"{prefix}attention_scaling")


def check(name: str, stated: dict[str, Any], found: Configuration) -> None:
    """Compare everything that a spec says."""
    config, module = theirs(name, stated)
    family, spec = found.family, found.spec
    names = outside_names(family, spec) | head_names(family, spec)
    for number, layer in enumerate(spec.layers, start=1):
        names |= layer_names(family, layer, number)
    stored = {weight: tuple(value.shape) for weight, value in module.state_dict().items()}
    if name in (MINICPM, LIGHTWEIGHT):  # their heads are not those of Granite and Gemma
        names = {weight: shape for weight, shape in names.items() if not weight.startswith("lm_head.")}
        del stored["lm_head.weight"]
        many = max(0, spec.depth - stated.get("start_layer", 8) + 1) if name == MINICPM else 1
        assert len(head_names(family, spec)) == many
    assert names == stored

    layers = module.get_submodule(family.layers)
    types = getattr(config, "layer_types", [FULL] * len(layers))
    for layer, theirs_, kind in zip(spec.layers, layers, types, strict=True):
        assert layer.causal is family.causal
        if hasattr(theirs_, "self_attn"):
            check_decoder_layer(layer, theirs_, config)
        else:
            check_encoder_layer(layer, theirs_)
        for part, role in family.layer.items():
            if "norm" in role and role not in layer.absent:
                assert same_norm(layer.norm, theirs_.get_submodule(part))
        if hasattr(module, "model"):
            check_rotary(layer, module, config, kind)
        else:
            assert layer.rotary is None
    check_around(module, config, found)


def check_around(module: Any, config: Any, found: Configuration) -> None:
    family, spec = found.family, found.spec
    table = module.get_input_embeddings()
    for part, role in {**family.outside, **family.head}.items():
        if "norm" in role and role not in spec.absent:
            assert same_norm(spec.norm, module.get_submodule(part))
    first = module.roberta.embeddings.padding_idx + 1 if hasattr(module, "roberta") else 0
    rope = getattr(config, "rope_parameters", None) or {}
    scaled = [rope.get(FULL, rope), *([rope[LOCAL]] if LOCAL in rope else [])]
    most, first_window = config.max_position_embeddings, "original_max_position_embeddings"
    windows = [one.get(first_window, most) for one in scaled if one.get("rope_type") == "longrope"]
    assert spec.window == min([most - first, *windows])
    assert spec.first_position == first
    assert spec.temperature == getattr(config, "logits_scaling", getattr(config, "temperature", None) or 1)
    assert spec.scale == getattr(table, "scalar_embed_scale", getattr(config, "embedding_multiplier", 1))
    assert spec.softcap == getattr(config, "final_logit_softcapping", None)
    assert spec.tied == (hasattr(module, "model") and not hasattr(module, "head") and config.tie_word_embeddings)
    said = getattr(config, "classifier_pooling", getattr(config, "pooling", "cls"))
    pooling = {"cls": "first", "mean": "mean", "avg": "mean", "last": "last"}[said]
    assert spec.pooling == ("last" if family.causal else pooling)
    head = (
        module.head.act if hasattr(module, "head") else ACTIVATIONS[getattr(config, "pooler_hidden_act", "tanh")]
    )
    head = module.classifier.activation if hasattr(module, "electra") else head
    assert same_activation(spec.activation, torch.relu if hasattr(module, "distilbert") else head)
    assert spec.typed is any(hasattr(module, body) for body in ("bert", "electra", "deberta"))
    if "num_labels" in found.fields:
        assert len(spec.labels) == config.num_labels
    if "eos_token_id" in found.fields:
        assert found.fields["eos_token_id"] == config.eos_token_id


@pytest.mark.parametrize("name", KNOWN)
def test_an_empty_configuration_has_the_defaults_of_transformers(name: str) -> None:
    check(name, {}, describe(PATH, {}, FAMILIES[name]))


@pytest.mark.parametrize("name", KNOWN)
def test_every_field_of_a_family_means_what_transformers_means(name: str) -> None:
    for field in FAMILIES[name].defaults:
        for value in values(name, field):
            stated = small(name) | {field: value}
            if field == "layer_types" and "use_sliding_window" in FAMILIES[name].defaults:
                stated["use_sliding_window"] = True
            check(name, stated, describe(PATH, stated, FAMILIES[name]))


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("seed", range(15))
def test_fields_together(name: str, seed: int) -> None:
    source = random.Random(f"{name} {seed}")
    fields = source.sample(sorted(FAMILIES[name].defaults), 6)
    stated = small(name) | {field: source.choice(values(name, field)) for field in fields}
    try:
        theirs(name, stated)
    except Exception:  # fields that contradict each other
        with pytest.raises(GratingError):
            describe(PATH, stated, FAMILIES[name])
    else:
        check(name, stated, describe(PATH, stated, FAMILIES[name]))


@pytest.mark.parametrize("name", KNOWN)
def test_null_is_what_it_is_for_transformers(name: str) -> None:
    """Where transformers refuses null, so do we, or null means that a size follows from the others."""
    for field in FAMILIES[name].defaults:
        stated = small(name) | {field: None}
        try:
            found = describe(PATH, stated, FAMILIES[name])
        except ModelNotFoundError as error:
            assert FAMILIES[name].field(field) in str(error)  # noqa: PT017 - only some are refused
            unused = name.startswith("Gemma3") and field == "rope_theta"  # all of so few layers are sliding
            assert name in _WRITTEN_OUT or unused or refused(name, stated), field
            continue
        if refused(name, stated):
            assert field in ("head_dim", "num_key_value_heads"), field
            stated = {key: value for key, value in stated.items() if key != field}
            stated |= {field: SMALL["num_attention_heads"]} if field == "num_key_value_heads" else {}
        check(name, stated, found)


def refused(name: str, stated: dict[str, Any]) -> bool:
    try:
        config, module = theirs(name, stated)
        if hasattr(module, "model"):
            type(module.model.rotary_emb)(config)
        if hasattr(module, "roberta"):
            module.roberta.embeddings.padding_idx + 1
    except Exception:
        return True
    return False


def everywhere(field: str, value: Any, shown: str = "") -> list[tuple[str, str, Any, str]]:
    """The refusal of a value by every family that knows the field."""
    return [
        (name, field, value, shown or f"{family.field(field)}={value!r}")
        for name, family in FAMILIES.items()
        if field in family.defaults and name in KNOWN
    ]


@pytest.mark.parametrize(
    ("name", "field", "value", "shown"),
    [
        *everywhere("hidden_act", "quick_gelu"),
        *everywhere("hidden_activation", "laplace"),
        *everywhere("classifier_activation", "mish"),
        *everywhere("classifier_pooling", "max"),
        *everywhere("rope_scaling", {"rope_type": "su"}, "rope_type='su'"),
        *everywhere("rope_scaling", {"rope_type": "default", "partial_rotary_factor": 0.5},
                    "partial_rotary_factor=0.5"),
        *everywhere("layer_types", [FULL, LOCAL, LOCAL, "chunked_attention"], "layer_types=['chunked_attention']"),
        ("LlamaForCausalLM", "layer_types", [FULL, LOCAL, FULL, FULL], "layer_types=['sliding_attention']"),
        ("LlamaForCausalLM", "rope_parameters", {FULL: {"rope_type": "yarn", "factor": 2}}, "rope_parameters="),
        ("ModernBertForSequenceClassification", "rope_parameters", {"rope_type": "yarn"}, "rope_parameters="),
        ("LlamaForCausalLM", "sliding_window", 4096, "sliding_window=4096"),
        *everywhere("pooler_hidden_act", "mish"),
        (DEBERTA, "conv_kernel_size", 3, "conv_kernel_size=3"),
        (DEBERTA, "embedding_size", 128, "embedding_size=128"),
        (DEBERTA, "pooler_hidden_size", 16, "pooler_hidden_size=16"),
        (DEBERTA, "attention_head_size", 32, "attention_head_size=32"),
        (DEBERTA, "pos_att_type", ["p2c", "p2p"], "pos_att_type=['p2c', 'p2p']"),
        (MINICPM, "head_type", "raw", "head_type='raw'"),
        (MINICPM, "head_multi", False, "head_multi=False"),
        (LIGHTWEIGHT, "layer_wise", False, "layer_wise=False"),
        (MINICPM, "embedding_multiplier", 12, "embedding_multiplier=12"),
        *[(name, "is_decoder", True, "is_decoder=True") for name in FAMILIES if not FAMILIES[name].causal],
        *[(name, "use_bidirectional_attention", True, "use_bidirectional_attention=True") for name in FAMILIES
          if FAMILIES[name].causal],
        (BIDIRECTIONAL, "is_causal", True, "is_causal=True"),
        (BIDIRECTIONAL, "pooling", "weighted_avg", "pooling='weighted_avg'"),
        ("Gemma3ForCausalLM", "attn_logit_softcapping", 50.0, "attn_logit_softcapping=50.0"),
        ("Phi3ForCausalLM", "partial_rotary_factor", 0.75, "partial_rotary_factor=0.75"),
    ],
)  # fmt: skip
def test_what_is_not_implemented_is_refused_by_name_and_value(
    name: str, field: str, value: Any, shown: str
) -> None:
    with pytest.raises(UnsupportedModelError) as refusal:
        describe(PATH, small(name) | {field: value}, FAMILIES[name])
    assert f"{PATH} has {shown}" in str(refusal.value)


@pytest.mark.parametrize("lacking", ["factor", "low_freq_factor", "high_freq_factor"])
def test_a_scaling_without_its_parameters_is_no_model(lacking: str) -> None:
    rope = {key: value for key, value in LLAMA3.items() if key != lacking}
    with pytest.raises(ModelNotFoundError, match=f"rope_type='llama3' without {lacking}"):
        describe(PATH, small("Qwen3ForCausalLM") | {"rope_parameters": rope}, FAMILIES["Qwen3ForCausalLM"])


def test_a_phi_has_no_other_scaling() -> None:
    """Its configurations of before 2024 call LongRoPE "yarn" or "su"."""
    stated = small("Phi3ForCausalLM") | {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}
    with pytest.raises(UnsupportedModelError, match="rope_type='yarn'"):
        describe(PATH, stated, FAMILIES["Phi3ForCausalLM"])


@pytest.mark.parametrize("given", [[1.0, 2.0], [1.0, 2.0, 0, 4.0], "1", [1.0, 2.0, 3.0, None]])
def test_factors_that_are_not_those_of_a_head(given: Any) -> None:
    stated = small("LlamaForCausalLM") | {"rope_scaling": LONGROPE | {"long_factor": given}}
    with pytest.raises(ModelNotFoundError, match="long_factor must be a list of 4 numbers"):
        describe(PATH, stated, FAMILIES["LlamaForCausalLM"])


@pytest.mark.parametrize("size", [9, 10**9])
def test_heads_that_no_model_has_take_no_memory(size: int) -> None:
    with pytest.raises(ModelNotFoundError, match=f"head_dim={size}"):
        describe(PATH, {"head_dim": size}, FAMILIES["Qwen3ForCausalLM"])
