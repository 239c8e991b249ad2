"""This module makes the tokenizer that transformers makes, without importing transformers, which takes seconds.

It does so where the files of a directory agree with each other and name a usual class, as nearly all do. It leaves
the rest to transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from operator import itemgetter
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE, Unigram, WordLevel, WordPiece

from grating_core.text.classes import CLASSES, NO_CLASS, OF_MODELS, Settings

TYPES = "token_type_ids"
"""The name under which a model gets to know which text a token belongs to."""
# The options that models of the tokenizers library have beside their vocabularies.
OPTIONS: dict[type, tuple[str, ...]] = {
    WordPiece: ("unk_token", "max_input_chars_per_word", "continuing_subword_prefix"),
    BPE: (
        "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback",
        "ignore_merges",
    ),
    WordLevel: ("unk_token",),
    Unigram: (),
}  # fmt: skip
_SWITCHES = ("add_bos_token", "add_eos_token")  # transformers ignores them beside a tokenizer.json
_FURTHER = ("additional_special_tokens", "extra_special_tokens")
# The settings that are read here or by a class, and those that change no token in any class.
_KNOWN = frozenset[str]().union(*(one.settings for one in CLASSES.values())) | {
    *_FURTHER, "added_tokens_decoder", "auto_map", "backend", "chat_template", "clean_up_tokenization_spaces",
    "do_basic_tokenize", "errors", "is_local", "local_files_only", "max_len", "max_length", "merges_file",
    "model_input_names", "model_max_length", "name_or_path", "never_split", "pad_to_multiple_of",
    "pad_token_type_id", "padding_side", "processor_class", "sp_model_kwargs", "spaces_between_special_tokens",
    "special_tokens_map_file", "split_special_tokens", "stride", "tokenizer_class", "tokenizer_file",
    "truncation_side", "truncation_strategy", "use_default_system_prompt", "use_fast", "vocab_file",
}  # fmt: skip


def settled(file: Tokenizer, files: Mapping[str, Settings]) -> tuple[Tokenizer, bool] | None:
    """Return the tokenizer that transformers makes of a directory.

    Args:
        file: The tokenizer in ``tokenizer.json``.
        files: The fields of the other files, by their names.

    Returns:
        The tokenizer, which shares the vocabulary of ``file``, and whether its model is to know which text a token
        belongs to. None if only transformers can tell.
    """
    try:
        return _settled(file, files)
    except (AttributeError, KeyError, TypeError, ValueError):  # transformers knows more, or says what is wrong
        return None


def _settled(file: Tokenizer, files: Mapping[str, Settings]) -> tuple[Tokenizer, bool]:
    """Return the same, or raise an error if only transformers can tell."""
    settings = files["tokenizer_config.json"]
    name = _class_of(settings, files["config.json"])
    found = None if name in NO_CLASS else CLASSES[name]
    others = {key for key in settings.keys() - _KNOWN if not key.endswith("_token")}
    if others or settings.get("split_special_tokens") or file.post_processor is None:
        raise ValueError(f"it is not known what {others} mean, or transformers makes a post-processor of its own")
    if "added_tokens_decoder" in settings:
        _check_added(file, settings["added_tokens_decoder"])
        stated = settings
    else:  # the files beside it count only without that
        _check_ids(file, files["added_tokens.json"])
        stated = {**settings, **files["special_tokens_map.json"]}
    defaults = {} if found is None else dict(found.tokens)
    tokens = {key: token for key, token in (defaults | _named(stated)).items() if token is not None}
    names = settings.get("model_input_names", [TYPES] if found and found.has_types else [])
    if not isinstance(names, list) or not {*tokens.values(), *_further(stated)} <= _contents(file):
        raise ValueError("model_input_names is no list, or transformers adds tokens")
    if found is None:
        return file, TYPES in names
    own = found.steps(settings, tokens, file)
    if type(own.model) is not type(file.model):
        raise ValueError("the class is made for another kind of vocabulary")
    _check_numbers(file)
    numbers = {token.content: number for number, token in file.get_added_tokens_decoder().items()}
    own.add_tokens(added_tokens(file))
    ends = file.post_processor if found.ends is None else found.ends(settings, tokens, numbers)
    made = with_steps(file, own)
    made.post_processor = ends
    return made, TYPES in names


def with_steps(whole: Tokenizer, own: Tokenizer) -> Tokenizer:
    """Return the vocabulary of one tokenizer with the steps and added tokens of another, but no post-processor."""
    model: Any = whole.model
    for name in OPTIONS[type(model)]:
        if getattr(model, name) != getattr(own.model, name):
            setattr(model, name, getattr(own.model, name))
    joined = Tokenizer(model)
    for step in ("normalizer", "pre_tokenizer", "decoder"):
        setattr(joined, step, getattr(own, step))
    joined.add_tokens(added_tokens(own))
    joined.encode_special_tokens = own.encode_special_tokens
    return joined


def added_tokens(tokenizer: Tokenizer) -> list[AddedToken]:
    """Return the added tokens of a tokenizer, by rising id."""
    return [token for _, token in sorted(tokenizer.get_added_tokens_decoder().items(), key=itemgetter(0))]


def _class_of(settings: Settings, config: Settings) -> str:
    """Return the name of the class that transformers takes."""
    model = config["model_type"]
    usual = OF_MODELS[model]
    declared: Any = settings.get("tokenizer_class", usual)
    name: str = declared if declared in NO_CLASS else declared.removesuffix("Fast")
    if (model == "qwen2" and name != usual) or ("tokenizer_class" in config and "tokenizer_class" not in settings):
        raise ValueError("releases of transformers differ in what they take")
    if model == "mistral" and find_spec("mistral_common"):
        raise ValueError("transformers may take the tokenizer of that package")
    return usual if usual in NO_CLASS else name


def _check_added(file: Tokenizer, stated: Mapping[str, Mapping[str, Any]]) -> None:
    """Require that the settings have the same added tokens as the file."""
    added = {number: token.__getstate__() for number, token in file.get_added_tokens_decoder().items()}
    if {int(number): AddedToken(**token).__getstate__() for number, token in stated.items()} != added:
        raise ValueError("added_tokens_decoder differs from tokenizer.json")


def _check_ids(file: Tokenizer, stated: Mapping[str, int]) -> None:
    """Require that the file has all tokens of ``added_tokens.json``."""
    added = {token.content: number for number, token in file.get_added_tokens_decoder().items()}
    if not stated.items() <= added.items():
        raise ValueError("added_tokens.json differs from tokenizer.json")


def _check_numbers(file: Tokenizer) -> None:
    """Require that the added tokens would get the ids that they have, if they were added one after another."""
    size = file.get_vocab_size(with_added_tokens=False)
    for number, token in sorted(file.get_added_tokens_decoder().items(), key=itemgetter(0)):
        known = file.model.token_to_id(token.content)
        size += known is None
        if number != (size - 1 if known is None else known):
            raise ValueError(f"the token {token.content!r} would get another id")


def _contents(file: Tokenizer) -> set[str]:
    return {token.content for token in file.get_added_tokens_decoder().values()}


def _named(stated: Settings) -> dict[str, str | None]:
    """Return the special tokens that have a name, by it; None for one that the settings take away."""
    return {
        name: None if token is None else _content(token)
        for name, token in stated.items()
        if name.endswith("_token") and name not in _SWITCHES
    }


def _further(stated: Settings) -> list[str]:
    """Return the special tokens in lists, or by a name of the model's own."""
    found: list[str] = []
    for name in _FURTHER:
        tokens = stated.get(name) or []
        found += map(_content, tokens.values() if isinstance(tokens, dict) else tokens)
    return found


def _content(token: Any) -> str:
    content = token if isinstance(token, str) else token["content"]
    if not isinstance(content, str):
        raise TypeError(f"{content!r} is no token")
    return content
