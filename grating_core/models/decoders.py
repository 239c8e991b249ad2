"""Decoder families: Llama and what is built like it, as language models that are asked and as classifiers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from grating_core.layers.spec import LayerSpec, Norm, Role
from grating_core.models.family import Family, Fields, ModelSpec
from grating_core.models.heads import score_answer, score_layerwise, score_linear
from grating_core.models.labels import FIELDS as LABELS
from grating_core.models.rope import FULL, SLIDING, stack


def _spec(
    fields: Fields,
    types: Sequence[str] = (),
    window: int | None = None,
    *,
    biased: frozenset[Role] = frozenset(),
    offset: float = 0.0,
    scale: float = 1.0,
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
        scaling=fields.get("query_pre_attn_scalar", size) ** -0.5,
        softcap=fields.get("attn_logit_softcapping"),
        residual=residual,
        biased=biased,
    )
    return ModelSpec(
        width=width,
        vocabulary=fields["vocab_size"],
        window=fields["max_position_embeddings"],
        layers=stack(layer, fields, types or [FULL] * fields["num_hidden_layers"], window),
        norm=norm,
        pooling="last",
        scale=scale,
        softcap=fields.get("final_logit_softcapping"),
        tied=fields.get("tie_word_embeddings", False),
    )


def _llama_spec(fields: Fields) -> ModelSpec:
    return _spec(fields)


def _mistral_spec(fields: Fields) -> ModelSpec:
    window, depth = fields["sliding_window"], fields["num_hidden_layers"]
    return _spec(fields, [FULL if window is None else SLIDING] * depth, window)


def _qwen3_spec(fields: Fields, biased: frozenset[Role] = frozenset()) -> ModelSpec:
    window = fields["sliding_window"] if fields["use_sliding_window"] else None
    first = fields["num_hidden_layers"] if window is None else fields["max_window_layers"]
    types = [FULL if number < first else SLIDING for number in range(fields["num_hidden_layers"])]
    return _spec(fields, fields["layer_types"] or types, window, biased=biased)


def _qwen2_spec(fields: Fields) -> ModelSpec:
    return _qwen3_spec(fields, biased=frozenset({"query", "key", "value"}))


def _gemma_spec(fields: Fields) -> ModelSpec:
    # The first checkpoints name another activation than the one that they were trained with.
    act = "gelu_pytorch_tanh" if fields["hidden_act"] == "gelu" else fields["hidden_act"]
    return _spec({**fields, "hidden_act": act}, offset=1.0, scale=fields["hidden_size"] ** 0.5)


def _gemma2_spec(fields: Fields) -> ModelSpec:
    types = fields["layer_types"] or [FULL if i % 2 else SLIDING for i in range(fields["num_hidden_layers"])]
    fields = {**fields, "hidden_act": fields["hidden_activation"]}
    return _spec(fields, types, fields["sliding_window"], offset=1.0, scale=fields["hidden_size"] ** 0.5)


def _minicpm_spec(fields: Fields) -> ModelSpec:
    residual = fields["scale_depth"] / fields["num_hidden_layers"] ** 0.5
    return replace(_spec(fields, scale=fields["scale_emb"], residual=residual), first_head=fields["start_layer"])


_LAYER = {
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
_QWEN3_LAYER = {**_LAYER, "self_attn.q_norm": "query_norm", "self_attn.k_norm": "key_norm"}
_GEMMA2_LAYER = {
    **_LAYER,
    "post_attention_layernorm": "attention_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "output_norm",
}

_ROPE = {
    "rope_parameters": None,
    "rope_scaling": None,
    "rope_theta": 10_000.0,
    "original_max_position_embeddings": None,
}
_LLAMA = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "hidden_act": "silu",
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "attention_bias": False, "mlp_bias": False,
    "tie_word_embeddings": False, "eos_token_id": 2, **_ROPE,
}  # fmt: skip
_MINICPM = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "hidden_act": "silu", "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6, "attention_bias": False, "scale_emb": 1.0, "scale_depth": 1.0, "start_layer": 8, **_ROPE,
}  # fmt: skip
_MISTRAL = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": None, "hidden_act": "silu",
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "sliding_window": 4096,
    "tie_word_embeddings": False, "eos_token_id": 2, **_ROPE,
}  # fmt: skip
_QWEN2 = {
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": None, "hidden_act": "silu",
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "use_sliding_window": False, "sliding_window": 4096,
    "max_window_layers": 28, "layer_types": None, "tie_word_embeddings": False, "eos_token_id": None, **_ROPE,
}  # fmt: skip
_QWEN3 = {**_QWEN2, "head_dim": 128, "attention_bias": False}
_GEMMA = {
    "vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "attention_bias": False, "tie_word_embeddings": True,
    "eos_token_id": 1, **_ROPE,
}  # fmt: skip
_GEMMA2 = {
    "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "attention_bias": False, "query_pre_attn_scalar": 256,
    "sliding_window": 4096, "layer_types": None, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True, "eos_token_id": 1, **_ROPE,
}  # fmt: skip

_ASKED = Family(
    architecture="LlamaForCausalLM",
    defaults=_LLAMA,
    spec=_llama_spec,
    layers="model.layers",
    layer=_LAYER,
    outside={"model.embed_tokens": "table", "model.norm": "final_norm"},
    head={"lm_head": "vocabulary"},
    score=score_answer,
    causal=True,
    asks=True,
)


def _both(name: str, described: Family) -> tuple[Family, Family]:
    """Return a decoder with the head of a language model, and with that of a classifier."""
    return replace(described, architecture=f"{name}ForCausalLM"), replace(
        described,
        architecture=f"{name}ForSequenceClassification",
        defaults={**described.defaults, **LABELS},
        head={"score": "classifier"},
        score=score_linear,
        asks=False,
    )


DECODERS: tuple[Family, ...] = (
    *_both("Llama", _ASKED),
    *_both("Mistral", replace(_ASKED, defaults=_MISTRAL, spec=_mistral_spec)),
    *_both("Qwen2", replace(_ASKED, defaults=_QWEN2, spec=_qwen2_spec)),
    *_both("Qwen3", replace(_ASKED, defaults=_QWEN3, spec=_qwen3_spec, layer=_QWEN3_LAYER)),
    *_both("Gemma", replace(_ASKED, defaults=_GEMMA, spec=_gemma_spec)),
    *_both("Gemma2", replace(_ASKED, defaults=_GEMMA2, spec=_gemma2_spec, layer=_GEMMA2_LAYER)),
    replace(
        _ASKED,
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
