"""ModernBERT's family, with the norms before attention and MLP, rotary positions and sliding windows."""

from __future__ import annotations

from dataclasses import replace

from grating_core.layers.spec import Norm
from grating_core.models.encoders import encoder_layer
from grating_core.models.family import Family, Fields, ModelSpec
from grating_core.models.heads import score_dense
from grating_core.models.labels import FIELDS as LABELS
from grating_core.models.rope import FULL, SLIDING, longest, stack


def _spec(fields: Fields) -> ModelSpec:
    norm = Norm("layer", fields["norm_eps"])
    biased = {
        "norm_bias": {"input_norm", "mlp_norm", "embedding_norm", "final_norm", "norm"},
        "attention_bias": {"query", "key", "value", "output"},
        "mlp_bias": {"gate", "up", "down"},
        "classifier_bias": {"dense"},
    }
    roles = frozenset({"classifier"}).union(*(roles for name, roles in biased.items() if fields[name]))
    layer = encoder_layer(fields, norm, activation=fields["hidden_activation"], gated=True, biased=roles)
    every, depth = fields["global_attn_every_n_layers"], fields["num_hidden_layers"]
    types = fields["layer_types"] or [SLIDING if number % every else FULL for number in range(depth)]
    first, *others = stack(layer, fields, types, fields["local_attention"] // 2 + 1)
    return ModelSpec(
        width=layer.width,
        vocabulary=fields["vocab_size"],
        window=longest(fields),
        layers=(replace(first, absent=frozenset({"input_norm"})), *others),
        norm=norm,
        pooling="mean" if fields["classifier_pooling"] == "mean" else "first",
        biased=roles,
        activation=fields["classifier_activation"],
    )


MODERNBERT = Family(
    architecture="ModernBertForSequenceClassification",
    defaults={
        "vocab_size": 50368, "hidden_size": 768, "num_hidden_layers": 22, "num_attention_heads": 12,
        "intermediate_size": 1152, "hidden_activation": "gelu", "max_position_embeddings": 8192, "norm_eps": 1e-5,
        "norm_bias": False, "attention_bias": False, "mlp_bias": False, "local_attention": 128,
        "layer_types": None, "global_attn_every_n_layers": 3, "rope_parameters": None, "rope_scaling": None,
        "global_rope_theta": 160_000.0, "local_rope_theta": 10_000.0, "classifier_pooling": "cls",
        "classifier_bias": False, "classifier_activation": "gelu", **LABELS,
    },
    spec=_spec,
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
