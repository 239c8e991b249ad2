"""Decoder families: Llama and what is built like it, as language models that are asked and as classifiers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from grating_core.layers.spec import LayerSpec, Norm, Role
from grating_core.models.family import Family, Fields, ModelSpec, Pooling
from grating_core.models.heads import score_answer, score_layerwise, score_linear
from grating_core.models.labels import FIELDS as LABELS
from grating_core.models.rope import FULL, SLIDING, longest, stack


def decoder_spec(
    fields: Fields,
    types: Sequence[str] = (),
    window: int | None = None,
    *,
    biased: frozenset[Role] = frozenset(),
    offset: float = 0.0,
    scale: float = 1.0,
    scaling: float | None = None,
    residual: float = 1.0,
) -> ModelSpec:
    """Return the spec of a decoder that is built like Llama.

    Args:
        fields: The fields that the family has. What a field is about is off in a family without it.
        types: The type of each layer; none if all have full attention.
        window: The window of sliding layers.
        biased: The roles that always have a bias.
        offset: See :class:`Norm`.
        scale: See :class:`ModelSpec`.
        scaling: See :class:`LayerSpec`; None for one by the size of a head.
        residual: See :class:`LayerSpec`.
    """
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    size, key_heads = fields.get("head_dim") or width // heads, fields["num_key_value_heads"] or heads
    if heads % key_heads:
        raise ValueError(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={key_heads}")
    if fields.get("attention_bias"):
        biased |= {"query", "key", "value", "output"}
    if fields.get("mlp_bias"):
        biased |= {"gate", "up", "down"}
    norm = Norm("rms", fields["rms_norm_eps"], offset)
    layer = LayerSpec(
        width=width,
        heads=heads,
        key_heads=key_heads,
        head_size=size,
        inner=fields["intermediate_size"],
        norm=norm,
        activation=fields["hidden_act"],
        gated=True,
        causal=True,
        scaling=fields.get("query_pre_attn_scalar", size) ** -0.5 if scaling is None else scaling,
        softcap=fields.get("attn_logit_softcapping"),
        residual=residual,
        biased=biased,
    )
    return ModelSpec(
        width=width,
        vocabulary=fields["vocab_size"],
        window=longest(fields),
        layers=stack(layer, fields, types or [FULL] * fields["num_hidden_layers"], window),
        norm=norm,
        pooling="last",
        scale=scale,
        softcap=fields.get("final_logit_softcapping"),
        tied=fields.get("tie_word_embeddings", False),
    )


def _llama_spec(fields: Fields) -> ModelSpec:
    return decoder_spec(fields)


def _mistral_spec(fields: Fields) -> ModelSpec:
    window, depth = fields["sliding_window"], fields["num_hidden_layers"]
    return decoder_spec(fields, [FULL if window is None else SLIDING] * depth, window)


def _qwen3_spec(fields: Fields, biased: frozenset[Role] = frozenset()) -> ModelSpec:
    window = fields["sliding_window"] if fields["use_sliding_window"] else None
    first = fields["num_hidden_layers"] if window is None else fields["max_window_layers"]
    types = [FULL if number < first else SLIDING for number in range(fields["num_hidden_layers"])]
    return decoder_spec(fields, fields["layer_types"] or types, window, biased=biased)


def _qwen2_spec(fields: Fields) -> ModelSpec:
    return _qwen3_spec(fields, biased=frozenset({"query", "key", "value"}))


def _granite_spec(fields: Fields) -> ModelSpec:
    spec = decoder_spec(
        fields,
        scale=fields["embedding_multiplier"],
        scaling=fields["attention_multiplier"],
        residual=fields["residual_multiplier"],
    )
    return replace(spec, temperature=fields["logits_scaling"])


def _bidirectional_spec(fields: Fields) -> ModelSpec:
    spec = decoder_spec(fields)
    return replace(
        spec,
        layers=tuple(replace(layer, causal=False) for layer in spec.layers),
        pooling=_POOLINGS[fields["pooling"]],
        temperature=fields["temperature"],
    )


def _minicpm_spec(fields: Fields) -> ModelSpec:
    residual = fields["scale_depth"] / fields["num_hidden_layers"] ** 0.5
    return replace(
        decoder_spec(fields, scale=fields["scale_emb"], residual=residual), first_head=fields["start_layer"]
    )


LAYER = {
    "input_layernorm": "input_norm",
    "self_attn.q_proj": "query",
    "self_attn.k_proj": "key",
    "self_attn.v_proj": "value",
    "self_attn.o_proj": "output",
    "post_attention_layernorm": "mlp_norm",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}
_PHI3_LAYER: dict[str, Role | tuple[Role, ...]] = {
    "input_layernorm": "input_norm",
    "self_attn.qkv_proj": ("query", "key", "value"),
    "self_attn.o_proj": "output",
    "post_attention_layernorm": "mlp_norm",
    "mlp.gate_up_proj": ("gate", "up"),
    "mlp.down_proj": "down",
}
NORMED_HEADS = {**LAYER, "self_attn.q_norm": "query_norm", "self_attn.k_norm": "key_norm"}
ROPE = {
    "rope_parameters": None,
    "rope_scaling": None,
    "rope_theta": 10_000.0,
    "original_max_position_embeddings": None,
}
_LLAMA = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "hidden_act": "silu",
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "attention_bias": False, "mlp_bias": False,
    "tie_word_embeddings": False, "eos_token_id": 2, **ROPE,
}  # fmt: skip
_POOLINGS: dict[str, Pooling] = {"avg": "mean", "cls": "first", "last": "last"}
"""What the head reads, by what the field ``pooling`` says."""

_MINICPM = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "hidden_act": "silu", "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6, "attention_bias": False, "scale_emb": 1.0, "scale_depth": 1.0, "start_layer": 8, **ROPE,
}  # fmt: skip
_MISTRAL = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": None, "hidden_act": "silu",
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "sliding_window": 4096,
    "tie_word_embeddings": False, "eos_token_id": 2, **ROPE,
}  # fmt: skip
_QWEN2 = {
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": None, "hidden_act": "silu",
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "use_sliding_window": False, "sliding_window": 4096,
    "max_window_layers": 28, "layer_types": None, "tie_word_embeddings": False, "eos_token_id": None, **ROPE,
}  # fmt: skip
_QWEN3 = {**_QWEN2, "head_dim": 128, "attention_bias": False}
_GRANITE = {
    **_LLAMA, "embedding_multiplier": 1.0, "attention_multiplier": 1.0, "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}  # fmt: skip
_PHI3 = {
    "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "hidden_act": "silu", "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "sliding_window": None, "tie_word_embeddings": False, "eos_token_id": 32000,
    **ROPE, "original_max_position_embeddings": 4096,
}  # fmt: skip

ASKED = Family(
    architecture="LlamaForCausalLM",
    defaults=_LLAMA,
    spec=_llama_spec,
    layers="model.layers",
    layer=LAYER,
    outside={"model.embed_tokens": "table", "model.norm": "final_norm"},
    head={"lm_head": "vocabulary"},
    score=score_answer,
    causal=True,
    asks=True,
)


def both(name: str, described: Family, classifier: str | None = None) -> tuple[Family, Family]:
    """Return a decoder with the head of a language model, and with that of a classifier.

    Args:
        name: What the names of both architectures begin with.
        described: The decoder.
        classifier: What the name of the classifier begins with, if it is another.
    """
    return replace(described, architecture=f"{name}ForCausalLM"), replace(
        described,
        architecture=f"{classifier or name}ForSequenceClassification",
        defaults={**described.defaults, **LABELS},
        head={"score": "classifier"},
        score=score_linear,
        asks=False,
    )


# NVIDIA's rerankers; https://github.com/NVIDIA-NeMo/Automodel, components/models/llama_bidirectional/model.py
_BIDIRECTIONAL = replace(
    both("Llama", ASKED)[1],
    architecture="LlamaBidirectionalForSequenceClassification",
    defaults={**_LLAMA, **LABELS, "pooling": "avg", "temperature": 1.0},
    spec=_bidirectional_spec,
    causal=False,
    fixed={"is_causal": False},
    prompt="nemotron-rerank",
)

DECODERS: tuple[Family, ...] = (
    *both("Llama", ASKED),
    *both("Mistral", replace(ASKED, defaults=_MISTRAL, spec=_mistral_spec)),
    *both("Qwen2", replace(ASKED, defaults=_QWEN2, spec=_qwen2_spec)),
    *both("Qwen3", replace(ASKED, defaults=_QWEN3, spec=_qwen3_spec, layer=NORMED_HEADS)),
    replace(ASKED, architecture="GraniteForCausalLM", defaults=_GRANITE, spec=_granite_spec),
    *both(
        "Phi3",
        replace(ASKED, defaults=_PHI3, spec=_mistral_spec, layer=_PHI3_LAYER, ropes=("default", "longrope")),
    ),
    _BIDIRECTIONAL,
    replace(
        ASKED,
        architecture="LayerWiseMiniCPMForCausalLM",
        defaults=_MINICPM,
        spec=_minicpm_spec,
        head={"lm_head.{}.linear_head": "heads.{}"},
        score=score_layerwise,
        fixed={"head_type": "simple", "head_multi": True},
        asks=False,
        prompt="bge-reranker-v2-minicpm-layerwise",
    ),
)  # fmt: skip
