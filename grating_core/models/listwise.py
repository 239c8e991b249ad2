"""The family of listwise rerankers: jina-reranker-v3, a Qwen3 that gives embeddings of query and documents.

The sources are the model's own code, https://huggingface.co/jinaai/jina-reranker-v3/blob/main/modeling.py, vLLM's
``vllm/model_executor/models/jina.py``, and "jina-reranker-v3: Last but Not Late Interaction for Listwise Document
Reranking" (arXiv 2509.25085).
"""

from __future__ import annotations

from dataclasses import replace

from grating_core.models.decoders import DECODERS
from grating_core.models.family import Family, Fields, HeadModule, ModelSpec
from grating_core.models.heads import embed_modules

_EMBEDDING = 512  # features of an embedding, which no field of the configuration says
_PROJECTOR = ("projector.0", "projector.2")


def _listwise_spec(fields: Fields) -> ModelSpec:
    """Return the spec: a Qwen3 and a projector. All states of the last layer are computed, for any may be read."""
    spec = _QWEN3.spec(fields)
    inner = spec.width // 2
    return replace(
        spec,
        pooling="mean",
        modules=(
            _projection(_PROJECTOR[0], inner, spec.width, "ReLU"),
            _projection(_PROJECTOR[1], _EMBEDDING, inner, "Identity"),
        ),
    )


def _projection(role: str, rows: int, columns: int, function: str) -> HeadModule:
    return HeadModule(
        role,
        parts=("linear",),
        biased=(),
        rows=rows,
        columns=columns,
        function=function,
        residual=False,
        source="sentence_embedding",
        target="sentence_embedding",
    )


_QWEN3 = next(family for family in DECODERS if family.architecture == "Qwen3ForCausalLM")

LISTWISE: Family = replace(
    _QWEN3,
    architecture="JinaForRanking",
    spec=_listwise_spec,
    head={name: f"{name}/linear" for name in _PROJECTOR},
    score=embed_modules,
    asks=False,
    listwise=True,
)
