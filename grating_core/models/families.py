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


@dataclass(frozen=True)
class Family:
    """How to drive one ``…ForSequenceClassification`` architecture of transformers from outside.

    Attributes:
        architecture: Name of the transformers class.
        layers: Dotted path of the module list that holds the layers.
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
    head: tuple[str, ...]
    embed: Callable[[Any, Tensor, Tensor, Tensor], Tensor]
    classify: Callable[[Any, Tensor], Tensor]
    window: Callable[[Config], int]
    pooling: Callable[[Config], str] = lambda config: "first"
    norm: str | None = None
    layer_arguments: Callable[[Any, nn.Module, Tensor, Tensor], dict[str, Any]] = lambda *_: {}


def _embed_bert(module: Any, input_ids: Tensor, token_type_ids: Tensor, positions: Tensor) -> Tensor:
    hidden: Tensor = module.bert.embeddings(
        input_ids=input_ids, token_type_ids=token_type_ids, position_ids=positions
    )
    return hidden


def _embed_roberta(module: Any, input_ids: Tensor, token_type_ids: Tensor, positions: Tensor) -> Tensor:
    embeddings = module.roberta.embeddings
    # RoBERTa numbers positions from behind the padding index, and has a single token type.
    hidden: Tensor = embeddings(
        input_ids=input_ids,
        token_type_ids=token_type_ids.new_zeros(token_type_ids.shape),
        position_ids=positions + embeddings.padding_idx + 1,
    )
    return hidden


def _embed_modernbert(module: Any, input_ids: Tensor, token_type_ids: Tensor, positions: Tensor) -> Tensor:
    hidden: Tensor = module.model.embeddings(input_ids=input_ids)
    return hidden


def _modernbert_rotary(module: Any, layer: Any, hidden: Tensor, positions: Tensor) -> dict[str, Any]:
    return {"position_embeddings": module.model.rotary_emb(hidden, positions, layer.attention_type)}


def _roberta(architecture: str) -> Family:
    return Family(
        architecture=architecture,
        layers="roberta.encoder.layer",
        head=("classifier",),
        embed=_embed_roberta,
        classify=lambda module, states: module.classifier(states[:, None]),
        window=lambda config: config.max_position_embeddings - config.pad_token_id - 1,
    )


_DESCRIPTIONS = (
    Family(
        architecture="BertForSequenceClassification",
        layers="bert.encoder.layer",
        head=("bert.pooler", "classifier"),
        embed=_embed_bert,
        classify=lambda module, states: module.classifier(module.bert.pooler(states[:, None])),
        window=lambda config: config.max_position_embeddings,
    ),
    _roberta("RobertaForSequenceClassification"),
    _roberta("XLMRobertaForSequenceClassification"),
    Family(
        architecture="ModernBertForSequenceClassification",
        layers="model.layers",
        norm="model.final_norm",
        head=("model.final_norm", "head", "classifier"),
        embed=_embed_modernbert,
        classify=lambda module, states: module.classifier(module.head(states)),
        window=lambda config: config.max_position_embeddings,
        pooling=lambda config: "mean" if config.classifier_pooling == "mean" else "first",
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
