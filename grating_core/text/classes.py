"""This module makes the steps that the usual tokenizer classes of transformers make around a vocabulary.

A class of transformers takes only the vocabulary from a ``tokenizer.json``. It makes the steps around that anew,
such as lower case and special tokens, from the settings in ``tokenizer_config.json``.
"""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram, WordPiece

Settings = Mapping[str, Any]

# The regular expression of Qwen2 for words, numbers, punctuation and white space.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UNKNOWN = "\U0010fffd"  # a character of no language


@dataclass(frozen=True)
class TokenizerClass:
    """This class describes a tokenizer class of transformers.

    Attributes:
        steps: ``(settings, special tokens, file's tokenizer) -> tokenizer`` that has steps and options, but no
            vocabulary.
        ends: ``(settings, special tokens, their ids) -> post-processor``; None for the one in the file.
        settings: The settings that the class makes its steps from.
        tokens: The special tokens that the class has if the settings name no others.
        has_types: Whether a model of this class is to know which text a token belongs to.
    """

    steps: Callable[[Settings, Mapping[str, str], Tokenizer], Tokenizer]
    settings: frozenset[str]
    tokens: Mapping[str, str]
    ends: Callable[[Settings, Mapping[str, str], Mapping[str, int]], Any] | None = None
    has_types: bool = False


def _unknown(tokens: Mapping[str, str], file: Tokenizer) -> str:
    if file.model.token_to_id(tokens["unk_token"]) is None:
        raise ValueError("the vocabulary has no token for what it does not know")
    return tokens["unk_token"]


def _bert(settings: Settings, tokens: Mapping[str, str], file: Tokenizer) -> Tokenizer:
    made = Tokenizer(WordPiece({}, unk_token=_unknown(tokens, file)))
    made.normalizer = normalizers.BertNormalizer(
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    return made


def _bert_ends(settings: Settings, tokens: Mapping[str, str], ids: Mapping[str, int]) -> Any:
    cls, sep = tokens["cls_token"], tokens["sep_token"]
    return processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(cls, ids[cls]), (sep, ids[sep])],
    )


def _bytes(settings: Settings, tokens: Mapping[str, str], file: Tokenizer) -> Tokenizer:
    made = Tokenizer(BPE({}, [], continuing_subword_prefix="", end_of_word_suffix=""))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=settings.get("add_prefix_space", False))
    made.decoder = decoders.ByteLevel()
    return made


def _roberta_ends(settings: Settings, tokens: Mapping[str, str], ids: Mapping[str, int]) -> Any:
    cls, sep = tokens["cls_token"], tokens["sep_token"]
    return processors.RobertaProcessing(
        (sep, ids[sep]),
        (cls, ids[cls]),
        trim_offsets=settings.get("trim_offsets", True),
        add_prefix_space=settings.get("add_prefix_space", False),
    )


def _xlm_roberta(settings: Settings, tokens: Mapping[str, str], file: Tokenizer) -> Tokenizer:
    if [token.id for token in file.model.tokenize(_UNKNOWN)] != [3]:
        raise ValueError("the class takes the token of id 3 for what it does not know")
    scheme = "always" if settings.get("add_prefix_space", True) else "never"
    made = Tokenizer(Unigram([("<unk>", 0.0)], unk_id=0))
    made.normalizer = _charsmap(file.normalizer)
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme=scheme)]
    )
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return made


def _charsmap(normalizer: Any) -> Any:
    """Return the first of the file's normalizers that is a compiled table, which is all that the class keeps."""
    state = {} if normalizer is None else json.loads(normalizer.__getstate__())
    for step in state.get("normalizers", [state]):
        if step.get("type") == "Precompiled":
            return normalizers.Precompiled(b64decode(step["precompiled_charsmap"]))
    return None


def _xlm_roberta_ends(settings: Settings, tokens: Mapping[str, str], ids: Mapping[str, int]) -> Any:
    begin, end = tokens["bos_token"], tokens["eos_token"]
    return processors.TemplateProcessing(
        single=[begin, "$A", end],
        pair=[begin, "$A", end, end, "$B", end],
        special_tokens=[(begin, ids[begin]), (end, ids[end])],
    )


def _qwen2(settings: Settings, tokens: Mapping[str, str], file: Tokenizer) -> Tokenizer:
    prefix = settings.get("add_prefix_space")
    made = _bytes({}, tokens, file)
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=prefix is not None and prefix, use_regex=False),
        ]
    )
    return made


def _gemma(settings: Settings, tokens: Mapping[str, str], file: Tokenizer) -> Tokenizer:
    made = Tokenizer(BPE({}, [], fuse_unk=True, byte_fallback=True, unk_token=_unknown(tokens, file)))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return made


def _llama(settings: Settings, tokens: Mapping[str, str], file: Tokenizer) -> Tokenizer:
    if any(b'"ByteLevel"' in step.__getstate__() for step in (file.pre_tokenizer, file.decoder) if step):
        raise ValueError("the name of the class is wrong, as in the files of Llama 3")
    prefix = settings.get("add_prefix_space")
    prefix = prefix is None or prefix
    scheme = "never" if not prefix else "always" if settings.get("legacy") else "first"
    made = Tokenizer(BPE({}, [], fuse_unk=True, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", left=1)] if prefix else steps)
    return made


def _tokens(**named: str) -> dict[str, str]:
    return {f"{name}_token": content for name, content in named.items()}


_USUAL = _tokens(bos="<s>", eos="</s>", sep="</s>", cls="<s>", unk="<unk>", pad="<pad>", mask="<mask>")
_TEXT_END = _tokens(unk="<|endoftext|>", bos="<|endoftext|>", eos="<|endoftext|>")
_PREFIX = frozenset({"add_prefix_space"})
_BERT = TokenizerClass(
    _bert,
    frozenset({"do_lower_case", "strip_accents", "tokenize_chinese_chars"}),
    _tokens(unk="[UNK]", sep="[SEP]", pad="[PAD]", cls="[CLS]", mask="[MASK]"),
    _bert_ends,
    has_types=True,
)
CLASSES = {
    "BertTokenizer": _BERT,
    "ElectraTokenizer": _BERT,
    "DistilBertTokenizer": replace(_BERT, has_types=False),
    "RobertaTokenizer": TokenizerClass(_bytes, _PREFIX | {"trim_offsets"}, _USUAL, _roberta_ends),
    "XLMRobertaTokenizer": TokenizerClass(_xlm_roberta, _PREFIX, _USUAL, _xlm_roberta_ends),
    "GPT2Tokenizer": TokenizerClass(_bytes, _PREFIX, _TEXT_END),
    "Qwen2Tokenizer": TokenizerClass(
        _qwen2, _PREFIX, _tokens(unk="<|endoftext|>", eos="<|endoftext|>", pad="<|endoftext|>")
    ),
    "GemmaTokenizer": TokenizerClass(
        _gemma, frozenset(), _tokens(unk="<unk>", bos="<bos>", eos="<eos>", pad="<pad>", mask="<mask>")
    ),
    "LlamaTokenizer": TokenizerClass(_llama, _PREFIX | {"legacy"}, _tokens(unk="<unk>", bos="<s>", eos="</s>")),
}
"""The classes of the models that grating runs, by their names in ``tokenizer_config.json``."""

NO_CLASS = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""The names that take ``tokenizer.json`` as it is."""

OF_MODELS = {
    "bert": "BertTokenizer", "electra": "BertTokenizer", "distilbert": "BertTokenizer",
    "roberta": "RobertaTokenizer", "xlm-roberta": "XLMRobertaTokenizer",
    "modernbert": "TokenizersBackend", "mistral": "TokenizersBackend", "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer", "gemma": "GemmaTokenizer", "gemma2": "GemmaTokenizer",
    "llama": None, "minicpm": None, "new": None,
}  # fmt: skip
"""The class that transformers has for a model, by its ``model_type``; None if the settings have to say."""
