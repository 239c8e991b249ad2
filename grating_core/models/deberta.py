"""DeBERTa v2 and v3: BERT with disentangled attention, which reads positions by their distances."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from grating_core.layers.spec import Norm, Relative, Role
from grating_core.models.encoders import encoder_layer
from grating_core.models.family import Family, Fields, ModelSpec
from grating_core.models.heads import score_dense
from grating_core.models.labels import FIELDS as LABELS

_LAYER: dict[str, Role] = {
    "attention.self.query_proj": "query",
    "attention.self.key_proj": "key",
    "attention.self.value_proj": "value",
    "attention.self.pos_key_proj": "position_key",
    "attention.self.pos_query_proj": "position_query",
    "attention.output.dense": "output",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "output_norm",
}


def _spec(fields: Fields) -> ModelSpec:
    norm, window = Norm("layer", fields["layer_norm_eps"]), fields["max_position_embeddings"]
    kinds, relative = _kinds(fields["pos_att_type"]), _relative(fields)
    own = {relative.key, relative.query} if relative is not None else set()
    layer = encoder_layer(
        fields,
        norm,
        activation=fields["hidden_act"],
        gated=False,
        norm_behind=True,
        relative=relative if own - {None} else None,
        biased=frozenset(_LAYER.values()),
        absent=frozenset({"position_key", "position_query"} - own),
    )
    # The products with positions are as large as the others, so that their sum is divided by more.
    layer = replace(layer, scaling=(layer.head_size * (1 + len(kinds))) ** -0.5)
    there = {
        "positions": fields["position_biased_input"],
        "types": fields["type_vocab_size"] > 0,
        "relative": relative is not None,
        "relative_norm": "layer_norm" in [name.strip() for name in fields["norm_rel_ebd"].lower().split("|")],
    }
    return ModelSpec(
        width=layer.width,
        vocabulary=fields["vocab_size"],
        window=window,
        layers=(layer,) * fields["num_hidden_layers"],
        norm=norm,
        pooling="first",
        types=fields["type_vocab_size"],
        positions=window if there["positions"] else 0,
        relative=2 * relative.span if relative is not None else 0,
        biased=frozenset({"embedding_norm", "relative_norm", "dense", "classifier"}),
        absent=frozenset(role for role, is_there in there.items() if not is_there),
        activation=fields["pooler_hidden_act"],
        typed=True,
    )


def _kinds(stated: str | list[str] | None) -> set[str]:
    """Return the kinds of products with positions: ``"c2p"``, of queries and keys of positions, and ``"p2c"``."""
    if isinstance(stated, str):
        stated = [kind.strip() for kind in stated.lower().split("|") if kind.strip()]
    return set(stated or ())


def _if_implemented(fields: Fields) -> object:
    """Return the kinds of products as they are stated, if grating implements all of them; else None."""
    stated = fields["pos_att_type"]
    return stated if _kinds(stated) <= {"c2p", "p2c"} else None


def _relative(fields: Fields) -> Relative | None:
    """Return the relative positions that a configuration describes, which may have no products; None for none."""
    if not fields["relative_attention"]:
        return None
    kinds, shared = _kinds(fields["pos_att_type"]), fields["share_att_key"]
    farthest, buckets = fields["max_relative_positions"], fields["position_buckets"]
    farthest = farthest if farthest > 0 else fields["max_position_embeddings"]
    if buckets > 0 and not 2 <= buckets < 2 * (farthest - 1):
        raise ValueError(f"position_buckets={buckets} does not fit max_relative_positions={farthest}")
    return Relative(
        span=buckets if buckets > 0 else farthest,
        buckets=buckets > 0,
        farthest=farthest,
        key=("key" if shared else "position_key") if "c2p" in kinds else None,
        query=("query" if shared else "position_query") if "p2c" in kinds else None,
    )


_DEFAULTS: dict[str, Any] = {
    "vocab_size": 128100, "hidden_size": 1536, "num_hidden_layers": 24, "num_attention_heads": 24,
    "intermediate_size": 6144, "hidden_act": "gelu", "max_position_embeddings": 512, "type_vocab_size": 0,
    "layer_norm_eps": 1e-7, "relative_attention": False, "max_relative_positions": -1, "position_buckets": -1,
    "pos_att_type": None, "share_att_key": False, "norm_rel_ebd": "none", "position_biased_input": True,
    "pooler_hidden_act": "gelu", **LABELS,
}  # fmt: skip

DEBERTA = Family(
    architecture="DebertaV2ForSequenceClassification",
    defaults=_DEFAULTS,
    spec=_spec,
    layers="deberta.encoder.layer",
    layer=_LAYER,
    outside={
        "deberta.embeddings.word_embeddings": "table",
        "deberta.embeddings.position_embeddings": "positions",
        "deberta.embeddings.token_type_embeddings": "types",
        "deberta.embeddings.LayerNorm": "embedding_norm",
        "deberta.encoder.rel_embeddings": "relative",
        "deberta.encoder.LayerNorm": "relative_norm",
    },
    head={"pooler.dense": "dense", "classifier": "classifier"},
    score=score_dense,
    fixed={
        "pos_att_type": _if_implemented,
        "embedding_size": lambda fields: fields["hidden_size"],
        "pooler_hidden_size": lambda fields: fields["hidden_size"],
        "attention_head_size": lambda fields: fields["hidden_size"] // fields["num_attention_heads"],
    },
)
