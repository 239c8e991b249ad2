"""Encoders whose checkpoints name code of their own. That code is never run: the families are described here.

* GTE's ``new`` (arXiv 2407.19669, section 2), such as gte-multilingual-reranker-base: BERT with rotary positions
  and a gated MLP. Checked against ``configuration.py`` and ``modeling.py`` of ``Alibaba-NLP/new-impl``.
* Jina's XLM-RoBERTa, such as jina-reranker-v2-base-multilingual: XLM-RoBERTa under the names of FlashAttention's
  BERT. Checked against ``modeling_xlm_roberta.py``, ``embedding.py`` and ``convert_roberta_weights_to_flash.py``
  of ``jinaai/xlm-roberta-flash-implementation``. Its configurations and those of XLM-RoBERTa name the same
  architecture, so that the names of the stored tensors tell which it is.
"""

from __future__ import annotations

from dataclasses import replace

from grating_core.layers.spec import Norm, Role
from grating_core.models.encoders import XLM_ROBERTA, encoder_layer
from grating_core.models.family import Family, Fields, ModelSpec
from grating_core.models.heads import score_dense
from grating_core.models.labels import FIELDS as LABELS
from grating_core.models.rope import FULL, stack


def _new_spec(fields: Fields) -> ModelSpec:
    norm = Norm("layer", fields["layer_norm_eps"])
    biased = frozenset({"query", "key", "value", "output", "down", "attention_norm", "output_norm"})
    layer = encoder_layer(
        fields, norm, activation=fields["hidden_act"], gated=True, norm_behind=True, biased=biased
    )
    types = fields["type_vocab_size"]
    return ModelSpec(
        width=layer.width,
        vocabulary=fields["vocab_size"],
        window=fields["max_position_embeddings"],
        layers=stack(layer, fields, [FULL] * fields["num_hidden_layers"], None),
        norm=norm,
        pooling="first",
        types=types,
        biased=frozenset({"embedding_norm", "dense", "classifier"}),
        typed=types > 1,
        absent=frozenset() if types else frozenset({"types"}),
    )


_REST: dict[str, Role | tuple[Role, ...]] = {
    "attention.o_proj": "output",
    "attn_ln": "attention_norm",
    "mlp.up_gate_proj": ("up", "gate"),
    "mlp.down_proj": "down",
    "mlp_ln": "output_norm",
}

_NEW = Family(
    architecture="NewForSequenceClassification",
    defaults={
        "vocab_size": 30528, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072, "hidden_act": "gelu", "max_position_embeddings": 2048, "type_vocab_size": 1,
        "layer_norm_eps": 1e-12, "position_embedding_type": "rope", "rope_theta": 10_000.0, "rope_scaling": None,
        "rope_parameters": None, **LABELS,
    },
    spec=_new_spec,
    layers="new.encoder.layer",
    layer={"attention.qkv_proj": ("query", "key", "value"), **_REST},
    outside={
        "new.embeddings.word_embeddings": "table",
        "new.embeddings.token_type_embeddings": "types",
        "new.embeddings.LayerNorm": "embedding_norm",
    },
    head={"new.pooler.dense": "dense", "classifier": "classifier"},
    score=score_dense,
    fixed={
        "position_embedding_type": "rope", "layer_norm_type": "layer_norm", "logn_attention_scale": False,
        "logn_attention_clip1": False,
    },
    ropes=("default", "ntk"),
)  # fmt: skip
_NOT_PACKED = {"attention.q_proj": "query", "attention.k_proj": "key", "attention.v_proj": "value", **_REST}

_JINA = replace(
    XLM_ROBERTA,
    layers="roberta.encoder.layers",
    layer={
        "mixer.Wqkv": ("query", "key", "value"),
        "mixer.out_proj": "output",
        "norm1": "attention_norm",
        "mlp.fc1": "up",
        "mlp.fc2": "down",
        "norm2": "output_norm",
    },
    outside={
        "roberta.embeddings.word_embeddings": "table",
        "roberta.embeddings.position_embeddings": "positions",
        "roberta.embeddings.token_type_embeddings": "types",
        "roberta.emb_ln": "embedding_norm",
    },
)

REMOTE = (
    replace(_NEW, variants=(replace(_NEW, layer=_NOT_PACKED),)),
    replace(XLM_ROBERTA, variants=(_JINA,)),
)
