"""Encoder families that are built like BERT, with the norms behind the residual sums."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from grating_core.layers.spec import LayerSpec, Norm
from grating_core.models.family import Family, Fields, ModelSpec
from grating_core.models.heads import score_dense
from grating_core.models.labels import FIELDS as LABELS


def encoder_layer(fields: Fields, norm: Norm, **own: Any) -> LayerSpec:
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
    layer = encoder_layer(
        fields, norm, activation=fields["hidden_act"], gated=False, norm_behind=True, biased=biased
    )
    return ModelSpec(
        width=layer.width,
        vocabulary=fields["vocab_size"],
        window=fields["max_position_embeddings"],
        layers=(layer,) * fields["num_hidden_layers"],
        norm=norm,
        pooling="first",
        types=fields["type_vocab_size"],
        positions=fields["max_position_embeddings"],
        biased=frozenset({"embedding_norm", "projection", "dense", "classifier"}),
        typed=True,
    )


def _roberta_spec(fields: Fields) -> ModelSpec:
    """Return BERT's spec, but a single token type, and positions that begin behind that of the padding token."""
    spec, first = _bert_spec(fields), fields["pad_token_id"] + 1
    return replace(spec, first_position=first, window=spec.positions - first, typed=False)


def _electra_spec(fields: Fields) -> ModelSpec:
    """Return BERT's spec, but tables as narrow as the configuration says, and always GELU in the head."""
    spec, row = _bert_spec(fields), fields["embedding_size"]
    absent = frozenset({"projection"} if row == spec.width else ())
    return replace(spec, embedding=row, absent=absent, activation="gelu")


def _distilbert_spec(fields: Fields) -> ModelSpec:
    """Return BERT's spec, but no token types, and ReLU in the head. Sinusoidal positions are stored too."""
    spec = _bert_spec({**fields, "layer_norm_eps": 1e-12, "type_vocab_size": 0})
    return replace(spec, activation="relu", typed=False)


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
        "layer_norm_eps": 1e-12, **LABELS,
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
XLM_ROBERTA = replace(
    _ROBERTA,
    architecture="XLMRobertaForSequenceClassification",
    defaults={**_ROBERTA.defaults, "vocab_size": 30522},
    fixed={"lora_adaptations": None},
)
_ELECTRA = replace(
    _BERT,
    architecture="ElectraForSequenceClassification",
    defaults={
        **_BERT.defaults, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024,
        "embedding_size": 128,
    },
    spec=_electra_spec,
    layers="electra.encoder.layer",
    outside={
        **{name.replace("bert", "electra"): role for name, role in _BERT.outside.items()},
        "electra.embeddings_project": "projection",
    },
    head={"classifier.dense": "dense", "classifier.out_proj": "classifier"},
)  # fmt: skip
_DISTILBERT = Family(
    architecture="DistilBertForSequenceClassification",
    defaults={
        "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 6, "num_attention_heads": 12,
        "intermediate_size": 3072, "hidden_act": "gelu", "max_position_embeddings": 512, **LABELS,
    },
    spec=_distilbert_spec,
    layers="distilbert.transformer.layer",
    layer={
        "attention.q_lin": "query",
        "attention.k_lin": "key",
        "attention.v_lin": "value",
        "attention.out_lin": "output",
        "sa_layer_norm": "attention_norm",
        "ffn.lin1": "up",
        "ffn.lin2": "down",
        "output_layer_norm": "output_norm",
    },
    outside={
        "distilbert.embeddings.word_embeddings": "table",
        "distilbert.embeddings.position_embeddings": "positions",
        "distilbert.embeddings.LayerNorm": "embedding_norm",
    },
    head={"pre_classifier": "dense", "classifier": "classifier"},
    score=score_dense,
    own_names={
        "hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
        "intermediate_size": "hidden_dim", "hidden_act": "activation",
    },
)  # fmt: skip

ENCODERS = (_BERT, _ROBERTA, _ELECTRA, _DISTILBERT)
