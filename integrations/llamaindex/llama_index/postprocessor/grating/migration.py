"""Calls written for other rerankers: what their arguments are called here, or what to do without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_FROM_INT = ("top_n", "model", "device", "keep_retrieval_score", "trust_remote_code")
_FROM_STR = ("model", "device", "cache_folder", "top_n", "keep_retrieval_score", "cross_encoder_kwargs")
"""The orders of SentenceTransformerRerank's arguments in llama-index-core and in the integration that follows it.
CohereRerank and RankGPTRerank begin like the first."""

_PUBLISHED = {
    "ms-marco-MiniLM-L-12-v2": "cross-encoder/ms-marco-MiniLM-L12-v2",
    "ms-marco-TinyBERT-L-2-v2": "cross-encoder/ms-marco-TinyBERT-L2-v2",
}
"""FlashRank's names of models, and where their weights are from."""

_HOSTED = "the model runs on this machine; leave it out"
_NO_LLM = "no language model is prompted; name a reranker with model= and leave it out"
_ADVICE = {
    # SentenceTransformerRerank, and what CrossEncoder takes
    "activation_fn": "scores are raw logits; apply the function to the nodes' scores",
    "cache_folder": "set the environment variable HF_HUB_CACHE, or name the model's directory with model=",
    "local_files_only": "set the environment variable HF_HUB_OFFLINE=1, or name a directory with model=",
    "prompts": "instruction= and template= say what a decoder is asked",
    "revision": "download that revision and name its directory with model=",
    "token": "set the environment variable HF_TOKEN, or log in with 'hf auth login'",
    # LLMRerank, StructuredLLMRerank, RankGPTRerank
    "llm": _NO_LLM,
    "choice_batch_size": "all candidates go through the model together, within memory_budget= if you set one",
    "choice_select_prompt": "instruction= and template= say what a decoder is asked",
    "rankgpt_rerank_prompt": "instruction= and template= say what a decoder is asked",
    "format_node_batch_fn": "metadata_mode= says which text of a node is judged",
    "parse_choice_select_answer_fn": _NO_LLM,
    "document_relevance_list_cls": _NO_LLM,
    "raise_on_structured_prediction_failure": _NO_LLM,
    "verbose": "the trace of every run is in the events; leave it out",
    # CohereRerank and other services
    "api_key": _HOSTED,
    "base_url": _HOSTED,
    "max_retries": _HOSTED,
    "max_tokens_per_doc": "max_length= bounds query and document together; long_documents= says what then happens",
}


def as_settings(args: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a constructor, as settings of ``GratingRerank``.

    Args:
        args: Those given by position, in the order of one of the rerankers that it replaces.
        named: Those given by name; unknown ones are left for the caller to refuse.

    Raises:
        ValueError: An argument has no place here; the message says what to do instead. Not for those that are
            None or False, which ask for nothing.
    """
    settings = {**_by_name(args, named), **named}
    extra = settings.pop("cross_encoder_kwargs", None) or {}
    settings = {**_of_cross_encoder(extra), **settings}
    settings.pop("trust_remote_code", None)  # a permission that nothing needs: code of a model is never run
    for name in filter(_ADVICE.__contains__, list(settings)):
        _refuse(name, settings.pop(name))
    model = settings.get("model")
    if isinstance(model, str) and not Path(model).is_dir():
        settings["model"] = _PUBLISHED.get(model, model)
    return settings


def _by_name(args: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    if not args:
        return {}
    order = _FROM_INT if isinstance(args[0], int) else _FROM_STR if isinstance(args[0], str) else ()
    if len(args) > len(order):
        raise ValueError(
            f"{len(args)} arguments by position, the first a {type(args[0]).__name__}, cannot be told apart: "
            f"write top_n=, model= and the others by name"
        )
    given = dict(zip(order, args, strict=False))
    if twice := given.keys() & named.keys():
        raise ValueError(f"{', '.join(sorted(twice))}: given by position and by name")
    return given


def _of_cross_encoder(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those arguments of sentence-transformers' CrossEncoder that are settings here."""
    kwargs = dict(kwargs)
    of_model = dict(kwargs.pop("model_kwargs", None) or {})
    settings: dict[str, Any] = {
        name: kwargs.pop(name) for name in ("max_length", "trust_remote_code") if name in kwargs
    }
    for name in ("torch_dtype", "dtype"):
        if name in of_model:
            settings["dtype"] = str(of_model.pop(name)).removeprefix("torch.")
    for name, value in {**kwargs, **of_model}.items():
        _refuse(name, value, "cross_encoder_kwargs: ")
    return settings


def _refuse(name: str, value: object, where: str = "") -> None:
    if value is None or value is False:
        return
    advice = _ADVICE.get(name, "if it is a setting of GratingRerank give it as such, else leave it out")
    # The value is not quoted: it may be somebody's key.
    raise ValueError(f"{where}{name} has no place in GratingRerank: {advice}")
