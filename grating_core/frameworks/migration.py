"""Calls that were written for other libraries: their arguments become settings here, or lead to advice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from numbers import Integral, Real
from pathlib import PurePath
from typing import Any, get_args

from grating_core.models.elsewhere import hub_name

_NESTED = ("automodel_args", "cross_encoder_kwargs", "model_kwargs")
"""These arguments hold others: those of sentence-transformers' CrossEncoder, and of the model in it."""

_RENAMED = {
    "cache_folder": "cache_dir", "max_new_tokens": "max_tokens", "model_name": "model", "stop_sequences": "stop",
    "torch_dtype": "dtype",
}  # fmt: skip
"""Other libraries have these names for fields here."""

_HERE = "the model runs on this machine and asks no service; leave it out"
_NO_LLM = "no language model is prompted; name a reranker with model= and leave it out"
_ASKED = "instruction= and template= say what a decoder is asked"
_SCALE = "raw_scores= says whether scores are raw logits or probabilities"
_ADVICE = {
    # sentence-transformers' CrossEncoder, and what wraps it
    "activation_fn": _SCALE,
    "backend": "there is only one; leave it out",
    "batch_size": "all candidates go through the model together, within memory_budget= if you set one",
    "config_kwargs": "the configuration is read as it is; leave it out",
    "default_activation_function": _SCALE,
    "num_labels": "a reranker has one; leave it out",
    "prompts": _ASKED,
    "tokenizer_kwargs": "the tokenizer is read as it is, and max_length= bounds what it makes; leave it out",
    "trust_remote_code": "code that comes with a model is never run; leave it out",
    # FlagEmbedding
    "normalize": _SCALE,
    "use_bf16": "write dtype='bfloat16'",
    "use_fp16": "write dtype='float16'; without it dtype='auto' takes what the processor is fast with",
    # language models as rerankers
    "llm": _NO_LLM,
    "choice_batch_size": "all candidates go through the model together, within memory_budget= if you set one",
    "choice_select_prompt": _ASKED,
    "rankgpt_rerank_prompt": _ASKED,
    "format_node_batch_fn": "metadata_mode= says which text of a node is judged",
    "parse_choice_select_answer_fn": _NO_LLM,
    "document_relevance_list_cls": _NO_LLM,
    "raise_on_structured_prediction_failure": _NO_LLM,
    "verbose": "the trace of every run is in the events; leave it out",
    # services, and libraries that want an object
    **dict.fromkeys(
        ("api_key", "base_url", "cohere_api_key", "jina_api_key", "max_retries", "session", "user_agent",
         "voyage_api_key"),
        _HERE,
    ),
    "client": "give the model's name as model, or a grating_core.Reranker as reranker",
    "max_tokens_per_doc": "max_length= bounds query and document together; long_documents= says what then happens",
}  # fmt: skip
"""These arguments have no place here; the texts say what to do instead."""


_ALIKE = 0.85  # of their letters, by which a misspelt name is told from one that means something else


def as_settings(
    owner: str, given: Mapping[str, Any], fields: Mapping[str, Any], *, ignored: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return the arguments of a constructor as the fields of a class take them.

    None, False and empty dictionaries ask for nothing, so they are left out unless the field itself takes them.
    Paths become text, numbers of numpy Python's, and FlashRank's names those of the same weights on the hub.

    Args:
        owner: The name of the class.
        given: The arguments by name.
        fields: The types of the class's fields by name.
        ignored: Names of arguments that mean nothing here, whatever they say.

    Returns:
        The settings. One that is no field, nor like one, nor known from elsewhere, is among them for the class
        to refuse.

    Raises:
        ValueError: An argument has no place here; the message says what to do instead, and never its value, which
            may be somebody's key.
    """
    settings: dict[str, Any] = {}
    for name, value in _flat(given):
        if name in settings or name in ignored or _asks_nothing(value, fields.get(name)):
            continue
        if name not in fields and (name in _ADVICE or name not in given):
            advice = _ADVICE.get(name, "leave it out")
            raise ValueError(f"{name} has no place in {owner}: {advice}")
        if name not in fields and (meant := get_close_matches(name, fields, 1, _ALIKE)):
            raise ValueError(f"{name} is not known to {owner}: did you mean {meant[0]}?")
        settings[name] = _plain(value)
    if "model" in settings:
        settings["model"] = _model_name(owner, settings["model"])
    return settings


def _flat(given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield arguments by their names here, then those nested in one, which count where none is given."""
    for name, value in given.items():
        if name not in _NESTED:
            yield _RENAMED.get(name, name), value
    for name in _NESTED:
        if inner := given.get(name):
            if not isinstance(inner, Mapping):
                raise ValueError(f"{name} must be a dictionary of arguments, not a {type(inner).__name__}")
            yield from _flat(inner)


def _asks_nothing(value: Any, kind: Any) -> bool:
    """Return whether a value means "not given" for a field of this type, or where there is no field."""
    taken = (kind, *get_args(kind))
    if kind is None and isinstance(value, Mapping) and not value:
        return True
    if value is None:
        return kind is None or not {type(None), Any} & set(taken)
    return value is False and not {bool, Any} & set(taken)


def _plain(value: Any) -> Any:
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, PurePath):
        return str(value)
    is_torch = type(value).__module__ == "torch"  # a dtype or a device
    return str(value).removeprefix("torch.") if is_torch else value


def _model_name(owner: str, model: object) -> str:
    if isinstance(model, str):
        return hub_name(model)
    kind = type(model).__name__
    if kind == "Reranker":
        raise ValueError(f"model must be a name; a {kind} that is ready goes to reranker=")
    raise ValueError(
        f"model={kind}(…) must be a name: the hub id, or the directory, of the weights to read. {owner} computes "
        f"with its own model and asks no other: use a {kind} with the library that it comes from"
    )
