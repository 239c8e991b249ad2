"""Encoder families: BERT and RoBERTa with the norms behind the residual sums, ModernBERT with them before."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from grating_core.layers.spec import LayerSpec, Norm
from grating_core.models.family import Family, Fields, ModelSpec
from grating_core.models.heads import score_dense
from grating_core.models.rope import FULL, SLIDING, stack


def _layer(fields: Fields, norm: Norm, **own: Any) -> LayerSpec:
    """Return the spec of a layer, with what all encoders have in common."""
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    if width % heads:
        raise ValueError(f"hidden_size={width} is not a multiple of num_attention_heads={heads}")
    size = width // heads
    return LayerSpec(
        width=width,
        heads=heads,
        key_heads=heads,
        head_size=size,
        inner=fields["intermediate_size"],
        norm=norm,
        scaling=size**-0.5,
        **own,
    )


def _bert_spec(fields: Fields) -> ModelSpec:
    norm, biased = Norm("layer", fields["layer_norm_eps"]), frozenset(_LAYER.values())
    layer = _layer(fields, norm, activation=fields["hidden_act"], gated=False, norm_behind=True, biased=biased)
    return ModelSpec(
        width=layer.width,
        vocabulary=fields["vocab_size"],
        window=fields["max_position_embeddings"],
        layers=(layer,) * fields["num_hidden_layers"],
        norm=norm,
        pooling="first",
        types=fields["type_vocab_size"],
        positions=fields["max_position_embeddings"],
        biased=frozenset({"embedding_norm", "dense", "classifier"}),
        typed=True,
    )


def _roberta_spec(fields: Fields) -> ModelSpec:
    """Return BERT's spec, but a single token type, and positions that begin behind that of the padding token."""
    spec, first = _bert_spec(fields), fields["pad_token_id"] + 1
    return replace(spec, first_position=first, window=spec.positions - first, typed=False)


def _modernbert_spec(fields: Fields) -> ModelSpec:
    norm = Norm("layer", fields["norm_eps"])
    biased = {
        "norm_bias": {"input_norm", "mlp_norm", "embedding_norm", "final_norm", "norm"},
        "attention_bias": {"query", "key", "value", "output"},
        "mlp_bias": {"gate", "up", "down"},
        "classifier_bias": {"dense"},
    }
    roles = frozenset({"classifier"}).union(*(roles for name, roles in biased.items() if fields[name]))
    layer = _layer(fields, norm, activation=fields["hidden_activation"], gated=True, biased=roles)
    every, depth = fields["global_attn_every_n_layers"], fields["num_hidden_layers"]
    types = fields["layer_types"] or [SLIDING if number % every else FULL for number in range(depth)]
    first, *others = stack(layer, fields, types, fields["local_attention"] // 2 + 1)
    return ModelSpec(
        width=layer.width,
        vocabulary=fields["vocab_size"],
        window=fields["max_position_embeddings"],
        layers=(replace(first, absent=frozenset({"input_norm"})), *others),
        norm=norm,
        pooling="mean" if fields["classifier_pooling"] == "mean" else "first",
        biased=roles,
        activation=fields["classifier_activation"],
    )


_LAYER = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "output",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "output_norm",
}

_BERT = Family(
    architecture="BertForSequenceClassification",
    defaults={
        "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072, "hidden_act": "gelu", "max_position_embeddings": 512, "type_vocab_size": 2,
        "layer_norm_eps": 1e-12, "num_labels": 2, "id2label": None,
    },
    spec=_bert_spec,
    layers="bert.encoder.layer",
    layer=_LAYER,
    outside={
        "bert.embeddings.word_embeddings": "table",
        "bert.embeddings.position_embeddings": "positions",
        "bert.embeddings.token_type_embeddings": "types",
        "bert.embeddings.LayerNorm": "embedding_norm",
    },
    head={"bert.pooler.dense": "dense", "classifier": "classifier"},
    score=score_dense,
)  # fmt: skip
_ROBERTA = replace(
    _BERT,
    architecture="RobertaForSequenceClassification",
    defaults={**_BERT.defaults, "vocab_size": 50265, "pad_token_id": 1},
    spec=_roberta_spec,
    layers="roberta.encoder.layer",
    outside={name.replace("bert", "roberta"): role for name, role in _BERT.outside.items()},
    head={"classifier.dense": "dense", "classifier.out_proj": "classifier"},
)
_XLM_ROBERTA = replace(
    _ROBERTA,
    architecture="XLMRobertaForSequenceClassification",
    defaults={**_ROBERTA.defaults, "vocab_size": 30522},
)
_MODERNBERT = Family(
    architecture="ModernBertForSequenceClassification",
    defaults={
        "vocab_size": 50368, "hidden_size": 768, "num_hidden_layers": 22, "num_attention_heads": 12,
        "intermediate_size": 1152, "hidden_activation": "gelu", "max_position_embeddings": 8192, "norm_eps": 1e-5,
        "norm_bias": False, "attention_bias": False, "mlp_bias": False, "local_attention": 128,
        "layer_types": None, "global_attn_every_n_layers": 3, "rope_parameters": None, "rope_scaling": None,
        "global_rope_theta": 160_000.0, "local_rope_theta": 10_000.0, "classifier_pooling": "cls",
        "classifier_bias": False, "classifier_activation": "gelu", "num_labels": 2, "id2label": None,
    },
    spec=_modernbert_spec,
    layers="model.layers",
    layer={
        "attn_norm": "input_norm",
        "attn.Wqkv": ("query", "key", "value"),
        "attn.Wo": "output",
        "mlp_norm": "mlp_norm",
        "mlp.Wi": ("gate", "up"),
        "mlp.Wo": "down",
    },
    outside={
        "model.embeddings.tok_embeddings": "table",
        "model.embeddings.norm": "embedding_norm",
        "model.final_norm": "final_norm",
    },
    head={"head.dense": "dense", "head.norm": "norm", "classifier": "classifier"},
    score=score_dense,
)  # fmt: skip

ENCODERS = (_BERT, _ROBERTA, _XLM_ROBERTA, _MODERNBERT)
