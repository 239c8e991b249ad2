"""Gemma's families: decoders like Llama, with more norms, scaled embeddings and soft-capping."""

from __future__ import annotations

from dataclasses import replace

from grating_core.models.decoders import ASKED, LAYER, NORMED_HEADS, ROPE, both, decoder_spec
from grating_core.models.family import Fields, ModelSpec
from grating_core.models.heads import score_first
from grating_core.models.rope import FULL, SLIDING


def _gemma_spec(fields: Fields) -> ModelSpec:
    # The first checkpoints name another activation than the one that they were trained with.
    act = "gelu_pytorch_tanh" if fields["hidden_act"] == "gelu" else fields["hidden_act"]
    return decoder_spec({**fields, "hidden_act": act}, offset=1.0, scale=fields["hidden_size"] ** 0.5)


def _gemma2_spec(fields: Fields) -> ModelSpec:
    types = fields["layer_types"] or [FULL if i % 2 else SLIDING for i in range(fields["num_hidden_layers"])]
    fields = {**fields, "hidden_act": fields["hidden_activation"]}
    return decoder_spec(fields, types, fields["sliding_window"], offset=1.0, scale=fields["hidden_size"] ** 0.5)


def _gemma3_spec(fields: Fields) -> ModelSpec:
    every, depth = fields["sliding_window_pattern"], fields["num_hidden_layers"]
    types = fields["layer_types"] or [SLIDING if number % every else FULL for number in range(1, depth + 1)]
    return _gemma2_spec({**fields, "layer_types": types})


def _lightweight_spec(fields: Fields) -> ModelSpec:
    return replace(_gemma2_spec(fields), first_head=fields["start_layer"])


_NORMS = {
    "post_attention_layernorm": "attention_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "output_norm",
}

_GEMMA = {
    "vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "attention_bias": False, "tie_word_embeddings": True,
    "eos_token_id": 1, **ROPE,
}  # fmt: skip
_GEMMA2 = {
    "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "attention_bias": False, "query_pre_attn_scalar": 256,
    "sliding_window": 4096, "layer_types": None, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True, "eos_token_id": 1, **ROPE,
}  # fmt: skip
# transformers does not use Gemma 3's field attn_logit_softcapping, so a value for it is refused.
_GEMMA3 = {
    "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "attention_bias": False, "query_pre_attn_scalar": 256,
    "sliding_window": 4096, "layer_types": None, "sliding_window_pattern": 6, "final_logit_softcapping": None,
    "tie_word_embeddings": True, "eos_token_id": 1, "rope_parameters": None, "rope_scaling": None,
    "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0,
}  # fmt: skip
_GEMMA2_FAMILY = replace(ASKED, defaults=_GEMMA2, spec=_gemma2_spec, layer={**LAYER, **_NORMS})

GEMMAS = (
    *both("Gemma", replace(ASKED, defaults=_GEMMA, spec=_gemma_spec)),
    *both("Gemma2", _GEMMA2_FAMILY),
    *both(
        "Gemma3",
        replace(ASKED, defaults=_GEMMA3, spec=_gemma3_spec, layer={**NORMED_HEADS, **_NORMS}),
        classifier="Gemma3Text",
    ),
    # bge-reranker-v2.5-gemma2-lightweight, without merging tokens (the published compress_ratio=1). The published
    # code reads whichever layer is asked for with the first head.
    # https://github.com/FlagOpen/FlagEmbedding, inference/reranker/decoder_only/models/gemma_model.py
    replace(
        _GEMMA2_FAMILY,
        architecture="CostWiseGemmaForCausalLM",
        defaults={**_GEMMA2, "start_layer": 28},
        spec=_lightweight_spec,
        head={"lm_head.0.linear_head": "heads.0"},
        score=score_first,
        fixed={"layer_wise": True},
        asks=False,
        prompt="bge-reranker-v2.5-gemma2-lightweight",
    ),
)
