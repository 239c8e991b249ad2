"""The model families grating runs, one short description each.

transformers owns the layers; a :class:`Family` only says where they are and how the parts around them are
called. To add a family, write its description and put it into :data:`FAMILIES`; the parity tests in
``tests/core/models`` take it from there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from grating_core.errors import UnsupportedModelError

Config = Any  # a transformers configuration; its attributes differ by architecture


# Functions rather than lambdas throughout: a family travels along when a reranker is pickled.
def _first_token(config: Config) -> str:
    return "first"


def _no_arguments(module: Any, layer: nn.Module, hidden: Tensor, positions: Tensor) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Family:
    """How to drive one ``…ForSequenceClassification`` architecture of transformers from outside.

    Attributes:
        architecture: Name of the transformers class.
        layers: Dotted path of the module list that holds the layers.
        embedding: Dotted path of the token embedding, an ``nn.Embedding``.
        head: Dotted paths of the modules that only the head uses. They are kept in float32.
        embed: ``(module, input_ids, token_type_ids, positions) -> hidden``, all int64 ``[1, T]`` in and
            ``[1, T, D]`` out; positions count from 0 within each sequence.
        classify: ``(module, states) -> logits``, float32 ``[N, D]`` in and ``[N, 1]`` out.
        window: ``config -> `` the most tokens that a pair may have.
        pooling: ``config -> "first"`` when the head reads the first token, ``"mean"`` when it reads the mean.
        norm: Dotted path of the norm between the last layer and pooling, if there is one.
        layer_arguments: ``(module, layer, hidden, positions) -> `` extra keyword arguments of a layer.
    """

    architecture: str
    layers: str
    embedding: str
    head: tuple[str, ...]
    embed: Callable[[Any, Tensor, Tensor, Tensor], Tensor]
    classify: Callable[[Any, Tensor], Tensor]
    window: Callable[[Config], int]
    pooling: Callable[[Config], str] = _first_token
    norm: str | None = None
    layer_arguments: Callable[[Any, nn.Module, Tensor, Tensor], dict[str, Any]] = _no_arguments


def _absolute_window(config: Config) -> int:
    return int(config.max_position_embeddings)


def _embed_bert(module: Any, input_ids: Tensor, token_type_ids: Tensor, positions: Tensor) -> Any:
    return module.bert.embeddings(input_ids=input_ids, token_type_ids=token_type_ids, position_ids=positions)


def _classify_bert(module: Any, states: Tensor) -> Any:
    return module.classifier(module.bert.pooler(states[:, None]))


def _embed_roberta(module: Any, input_ids: Tensor, token_type_ids: Tensor, positions: Tensor) -> Any:
    embeddings = module.roberta.embeddings
    # RoBERTa numbers positions from behind the padding index, and has a single token type.
    return embeddings(
        input_ids=input_ids,
        token_type_ids=token_type_ids.new_zeros(token_type_ids.shape),
        position_ids=positions + embeddings.padding_idx + 1,
    )


def _classify_roberta(module: Any, states: Tensor) -> Any:
    return module.classifier(states[:, None])


def _roberta_window(config: Config) -> int:
    return int(config.max_position_embeddings) - int(config.pad_token_id) - 1


def _embed_modernbert(module: Any, input_ids: Tensor, token_type_ids: Tensor, positions: Tensor) -> Any:
    return module.model.embeddings(input_ids=input_ids)


def _classify_modernbert(module: Any, states: Tensor) -> Any:
    return module.classifier(module.head(states))


def _modernbert_pooling(config: Config) -> str:
    return "mean" if config.classifier_pooling == "mean" else "first"


def _modernbert_rotary(module: Any, layer: Any, hidden: Tensor, positions: Tensor) -> dict[str, Any]:
    return {"position_embeddings": module.model.rotary_emb(hidden, positions, layer.attention_type)}


def _roberta(architecture: str) -> Family:
    return Family(
        architecture=architecture,
        layers="roberta.encoder.layer",
        embedding="roberta.embeddings.word_embeddings",
        head=("classifier",),
        embed=_embed_roberta,
        classify=_classify_roberta,
        window=_roberta_window,
    )


_DESCRIPTIONS = (
    Family(
        architecture="BertForSequenceClassification",
        layers="bert.encoder.layer",
        embedding="bert.embeddings.word_embeddings",
        head=("bert.pooler", "classifier"),
        embed=_embed_bert,
        classify=_classify_bert,
        window=_absolute_window,
    ),
    _roberta("RobertaForSequenceClassification"),
    _roberta("XLMRobertaForSequenceClassification"),
    Family(
        architecture="ModernBertForSequenceClassification",
        layers="model.layers",
        embedding="model.embeddings.tok_embeddings",
        norm="model.final_norm",
        head=("model.final_norm", "head", "classifier"),
        embed=_embed_modernbert,
        classify=_classify_modernbert,
        window=_absolute_window,
        pooling=_modernbert_pooling,
        layer_arguments=_modernbert_rotary,
    ),
)

FAMILIES: dict[str, Family] = {family.architecture: family for family in _DESCRIPTIONS}


def find_family(architectures: list[str] | None) -> Family:
    """The family of a checkpoint, from the ``architectures`` field of its configuration.

    Raises:
        UnsupportedModelError: The architecture is unknown here; the message lists the known ones.
    """
    for name in architectures or ():
        if name in FAMILIES:
            return FAMILIES[name]
    raise UnsupportedModelError(
        f"the model's config.json names architectures={architectures!r}; supported are "
        f"{', '.join(FAMILIES)}, each with one label"
    )
