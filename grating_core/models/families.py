"""This module describes each model family that grating runs.

transformers owns the layers; a :class:`Family` only says where the layers are and how the parts around them are
called. To add a family, write its description and put it into :data:`FAMILIES`; the parity tests in
``tests/core/models`` take it from there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import transformers
from torch import Tensor, nn

from grating_core.errors import UnsupportedModelError
from grating_core.models.heads import AnswerHead, LayerwiseHeads

Config = Any  # a transformers configuration; its attributes differ by architecture


# All of these are functions, not lambdas, because a family is pickled with its reranker.
def _no_arguments(module: Any, layer: nn.Module, hidden: Tensor, positions: Tensor) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Family:
    """A family says how to drive one architecture of transformers from outside.

    Attributes:
        architecture: The architecture's name in a checkpoint's ``config.json``.
        layers: Dotted path of the module list that holds the layers.
        embedding: Dotted path of the token embedding, an ``nn.Embedding``.
        head: Dotted paths of the modules that only the head uses. They are kept in float32.
        embed: ``(module, input_ids, token_type_ids, positions) -> hidden``, from int64 ``[1, T]`` to
            ``[1, T, D]``. Positions count from 0 within each sequence.
        classify: ``(module, states, number) -> logits``, from float32 ``[N, D]`` after layer ``number`` to
            ``[N, 1]``.
        norm: Dotted path of the norm between the last layer and pooling, if there is one.
        layer_arguments: ``(module, layer, hidden, positions) -> `` extra keyword arguments of a layer.
        causal: Whether a token sees only the tokens before it. The common beginning of all pairs is then computed
            once for all, and the head reads the last token.
        padded_positions: Whether the first position is the padding index plus one, as in RoBERTa.
        built_as: Name of the transformers class that has these layers; None for the checkpoint's own class.
        read_config: ``fields of config.json -> config``; None for transformers' own way.
        head_module: ``config -> module`` that takes the place of ``lm_head``.
        asks: Whether the score is the logit of an answer, see :class:`AnswerHead`.
        prompt: Name of the official prompt of all models of this architecture; None if they have none.
    """

    architecture: str
    layers: str
    embedding: str
    head: tuple[str, ...]
    embed: Callable[[Any, Tensor, Tensor, Tensor], Tensor]
    classify: Callable[[Any, Tensor, int], Tensor]
    norm: str | None = None
    layer_arguments: Callable[[Any, nn.Module, Tensor, Tensor], dict[str, Any]] = _no_arguments
    causal: bool = False
    padded_positions: bool = False
    built_as: str | None = None
    read_config: Callable[[Mapping[str, Any]], Config] | None = None
    head_module: Callable[[Config], nn.Module] | None = None
    asks: bool = False
    prompt: str | None = None

    @property
    def module_class(self) -> Any:
        """The transformers class that has the layers."""
        return getattr(transformers, self.built_as or self.architecture)

    def config(self, fields: Mapping[str, Any]) -> Config:
        """Return the configuration that a ``config.json`` with these fields describes."""
        return self.read_config(fields) if self.read_config else self.module_class.config_class.from_dict(fields)

    def build(self, config: Config) -> Any:
        """Return the module. Its weights have arbitrary values."""
        module = self.module_class(config)
        if self.head_module is not None:
            module.lm_head = self.head_module(config)
        return module

    def window(self, config: Config) -> int:
        """Return the most tokens that a pair may have."""
        return int(config.max_position_embeddings) - (config.pad_token_id + 1 if self.padded_positions else 0)

    def pooling(self, config: Config) -> str:
        """Return ``"first"`` or ``"last"`` when the head reads that token, ``"mean"`` when it reads the mean."""
        if self.causal:
            return "last"
        return "mean" if getattr(config, "classifier_pooling", "cls") == "mean" else "first"


def _embed_bert(module: Any, input_ids: Tensor, token_type_ids: Tensor, positions: Tensor) -> Any:
    return module.bert.embeddings(input_ids=input_ids, token_type_ids=token_type_ids, position_ids=positions)


def _classify_bert(module: Any, states: Tensor, number: int) -> Any:
    return module.classifier(module.bert.pooler(states[:, None]))


def _embed_roberta(module: Any, input_ids: Tensor, token_type_ids: Tensor, positions: Tensor) -> Any:
    embeddings = module.roberta.embeddings
    return embeddings(
        input_ids=input_ids,
        token_type_ids=token_type_ids.new_zeros(token_type_ids.shape),  # RoBERTa has a single type
        position_ids=positions + embeddings.padding_idx + 1,
    )


def _classify_roberta(module: Any, states: Tensor, number: int) -> Any:
    return module.classifier(states[:, None])


def _embed_modernbert(module: Any, input_ids: Tensor, token_type_ids: Tensor, positions: Tensor) -> Any:
    return module.model.embeddings(input_ids=input_ids)


def _classify_modernbert(module: Any, states: Tensor, number: int) -> Any:
    return module.classifier(module.head(states))


def _modernbert_rotary(module: Any, layer: Any, hidden: Tensor, positions: Tensor) -> dict[str, Any]:
    return {"position_embeddings": module.model.rotary_emb(hidden, positions, layer.attention_type)}


def _embed_decoder(module: Any, input_ids: Tensor, token_type_ids: Tensor, positions: Tensor) -> Any:
    return module.model.embed_tokens(input_ids)


def _embed_granite(module: Any, input_ids: Tensor, token_type_ids: Tensor, positions: Tensor) -> Any:
    return module.model.embed_tokens(input_ids) * module.model.embedding_multiplier


def _rotary(module: Any, layer: nn.Module, hidden: Tensor, positions: Tensor) -> dict[str, Any]:
    return {"position_embeddings": module.model.rotary_emb(hidden, positions)}


def _classify_linear(module: Any, states: Tensor, number: int) -> Any:
    return module.score(states)


def _classify_answer(module: Any, states: Tensor, number: int) -> Any:
    return module.lm_head(states)


def _classify_layerwise(module: Any, states: Tensor, number: int) -> Any:
    return module.lm_head(states, number)


def _answer_head(config: Config) -> nn.Module:
    return AnswerHead(config.hidden_size, softcap=getattr(config, "final_logit_softcapping", None))


def _layerwise_heads(config: Config) -> nn.Module:
    return LayerwiseHeads(config.hidden_size, config.start_layer, config.num_hidden_layers)


def _minicpm_config(fields: Mapping[str, Any]) -> Config:
    """Return Granite's configuration for a MiniCPM: both are a Llama with scaled embeddings and residuals."""
    if (kind := fields.get("head_type", "simple")) != "simple" or not fields.get("head_multi", True):
        raise UnsupportedModelError(
            f"config.json has head_type={kind!r}, head_multi={fields.get('head_multi')}; grating runs MiniCPM "
            f"rerankers with one simple head per layer (head_type='simple', head_multi=true)"
        )
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_theta",
        "rope_scaling", "attention_bias", "pad_token_id", "bos_token_id", "eos_token_id",
    )  # fmt: skip
    depth = fields["num_hidden_layers"]
    config = transformers.GraniteConfig(
        **{name: fields[name] for name in names if fields.get(name) is not None},
        embedding_multiplier=fields.get("scale_emb", 1),
        residual_multiplier=fields.get("scale_depth", 1) / depth**0.5,
        attention_multiplier=(fields["hidden_size"] // fields["num_attention_heads"]) ** -0.5,
        tie_word_embeddings=False,
    )
    config.start_layer = fields.get("start_layer", 8)
    return config


_BERT = Family(
    architecture="BertForSequenceClassification",
    layers="bert.encoder.layer",
    embedding="bert.embeddings.word_embeddings",
    head=("bert.pooler", "classifier"),
    embed=_embed_bert,
    classify=_classify_bert,
)
_ROBERTA = Family(
    architecture="RobertaForSequenceClassification",
    layers="roberta.encoder.layer",
    embedding="roberta.embeddings.word_embeddings",
    head=("classifier",),
    embed=_embed_roberta,
    classify=_classify_roberta,
    padded_positions=True,
)
_MODERNBERT = Family(
    architecture="ModernBertForSequenceClassification",
    layers="model.layers",
    embedding="model.embeddings.tok_embeddings",
    norm="model.final_norm",
    head=("model.final_norm", "head", "classifier"),
    embed=_embed_modernbert,
    classify=_classify_modernbert,
    layer_arguments=_modernbert_rotary,
)
# These decoders are built like Llama, with the head of a classifier.
_CLASSIFIER = Family(
    architecture="LlamaForSequenceClassification",
    layers="model.layers",
    embedding="model.embed_tokens",
    norm="model.norm",
    head=("model.norm", "score"),
    embed=_embed_decoder,
    classify=_classify_linear,
    layer_arguments=_rotary,
    causal=True,
)
# These are the same decoders with the head of a language model.
_ASKED = replace(
    _CLASSIFIER,
    architecture="LlamaForCausalLM",
    head=("model.norm", "lm_head"),
    classify=_classify_answer,
    head_module=_answer_head,
    asks=True,
)
_DECODERS = ("Llama", "Qwen2", "Qwen3", "Gemma", "Gemma2")
_DESCRIPTIONS = (
    _BERT,
    _ROBERTA,
    replace(_ROBERTA, architecture="XLMRobertaForSequenceClassification"),
    _MODERNBERT,
    *(
        replace(family, architecture=f"{name}{kind}")
        for name in _DECODERS
        for family, kind in ((_ASKED, "ForCausalLM"), (_CLASSIFIER, "ForSequenceClassification"))
    ),
    replace(
        _ASKED,
        architecture="LayerWiseMiniCPMForCausalLM",
        built_as="GraniteForCausalLM",
        read_config=_minicpm_config,
        embed=_embed_granite,
        classify=_classify_layerwise,
        head_module=_layerwise_heads,
        asks=False,
        prompt="bge-reranker-v2-minicpm-layerwise",
    ),
)

FAMILIES: dict[str, Family] = {family.architecture: family for family in _DESCRIPTIONS}


def find_family(architectures: list[str] | None) -> Family:
    """Return the family of a checkpoint, from the ``architectures`` field of its configuration.

    Raises:
        UnsupportedModelError: grating does not know the architecture; the message lists those that it knows.
    """
    for name in architectures or ():
        if name in FAMILIES:
            return FAMILIES[name]
    raise UnsupportedModelError(
        f"the model has architectures={architectures!r}; supported are "
        f"{', '.join(FAMILIES)}; classifiers must have one label"
    )
