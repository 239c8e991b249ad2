"""This module loads the tokenizer in a model's files, which makes the tokens that transformers makes."""

from __future__ import annotations

import json
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE, Unigram
from tokenizers.normalizers import Lowercase, Sequence

from grating_core.errors import ModelNotFoundError, UnsupportedModelError
from grating_core.files.reading import parse_json
from grating_core.models.directory import has_tokenizer, is_gguf
from grating_core.models.modules import read_object, transformer_folder
from grating_core.text.gguf import gguf_tokenizer
from grating_core.text.inputs import read_inputs
from grating_core.text.settled import OPTIONS, TYPES, added_tokens, settled, with_steps

_PROBE = "Aa é 漢 🎉 1 [SEP]"  # something for every step of a tokenizer, and a character that few know
# These settings name code or files elsewhere, which a tokenizer of a few tokens does not need.
_CLASSES_NAMED = ("model_type", "tokenizer_class")
_NOT_SETTINGS = ("auto_map", "chat_template", "name_or_path")


def load_backend(directory: Path, rows: int | None = None) -> tuple[Tokenizer, bool]:
    """Load the tokenizer of a model, and tell whether the model is to know which text a token belongs to.

    Token ids are those of transformers' tokenizer for the directory. :mod:`grating_core.text.settled` makes the
    usual tokenizers. For others, transformers makes a tokenizer with the same files and a vocabulary of a few
    tokens, and this function uses its steps with the whole vocabulary. transformers' own wrapper keeps copies of
    the vocabulary, which take another 130 MB for 250,000 entries.

    Args:
        directory: The tokenizer's directory, or a GGUF file.
        rows: Number of rows of the embedding table. A token without a row is refused; None refuses no token.

    Raises:
        ModelNotFoundError: The tokenizer's files are missing or damaged, need a package that is not installed, or
            belong to a model with more tokens.
        UnsupportedModelError: The tokenizer has no Rust backend.
    """
    if is_gguf(directory):
        backend, has_types = gguf_tokenizer(directory)[0], False
    else:
        backend, has_types = _from_files(transformer_folder(directory))
    if read_inputs(directory).lowercase:
        _make_lowercase(backend)
    token, last = max(backend.get_vocab(with_added_tokens=True).items(), key=itemgetter(1), default=("", -1))
    if rows is not None and last >= rows:  # fewer tokens are usual
        raise ModelNotFoundError(
            f"{directory / 'tokenizer.json'} has the token {token!r} of id {last}, and the embedding table that "
            f"{directory / 'config.json'} describes has {rows} rows: the two files belong to different models"
        )
    backend.no_padding()
    backend.no_truncation()
    return backend, has_types


def _make_lowercase(backend: Tokenizer) -> None:
    """Add a step that makes capital letters small, before all others, if there is none."""
    steps = parse_json(backend.to_str())["normalizer"] or {}
    steps = steps.get("normalizers", [steps])
    if not any(step.get("type") == "Lowercase" for step in steps):
        found = [backend.normalizer] if backend.normalizer is not None else []
        backend.normalizer = Sequence([Lowercase(), *found])


def _from_files(directory: Path) -> tuple[Tokenizer, bool]:
    if not has_tokenizer(directory):
        raise ModelNotFoundError(
            f"{directory} has no tokenizer.json, vocabulary or sentencepiece model: fetch these files again, or "
            f"save the tokenizer there that the model was trained with (AutoTokenizer's save_pretrained)"
        )
    settings = read_settings(directory)
    try:
        if (directory / "tokenizer.json").is_file():
            backend, has_types = _with_settings(directory, settings)
        else:
            backend, has_types = _reference(directory)
        if backend is not None and not backend.encode(_PROBE, _PROBE).ids:
            raise ValueError("it makes no tokens from a text")
    except ModelNotFoundError:
        raise
    except BaseException as error:
        # The tokenizers library raises plain Exception for damaged files. Its PanicException is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelNotFoundError(
            f"the tokenizer in {directory} cannot be loaded: {error or type(error).__name__}. See tokenizer.json, "
            f"tokenizer_config.json and special_tokens_map.json there"
        ) from error
    if backend is None:
        raise UnsupportedModelError(f"{directory} has a tokenizer without tokenizer.json; convert it to that form")
    return backend, has_types


def read_settings(directory: Path) -> dict[str, Any]:
    """Return what ``tokenizer_config.json`` says; an empty dictionary if there is no such file.

    Raises:
        ModelNotFoundError: The file is damaged.
    """
    if is_gguf(directory):
        return gguf_tokenizer(directory)[1]
    return read_object(transformer_folder(directory) / "tokenizer_config.json")


def _reference(directory: Path) -> tuple[Any, bool]:
    from transformers import AutoTokenizer  # slow to import

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    return getattr(tokenizer, "backend_tokenizer", None), TYPES in tokenizer.model_input_names


def _with_settings(directory: Path, settings: dict[str, Any]) -> tuple[Any, bool]:
    """Return the tokenizer of ``tokenizer.json``, with the steps that transformers makes from the settings."""
    whole = Tokenizer.from_file(str(directory / "tokenizer.json"))
    names = ("config.json", "special_tokens_map.json", "added_tokens.json")
    files = {"tokenizer_config.json": settings} | {name: read_object(directory / name) for name in names}
    if found := settled(whole, files):
        return found
    try:
        with TemporaryDirectory(prefix="grating-") as folder:
            _write_small(Path(folder), whole, files)
            own, has_types = _reference(Path(folder))
    except OSError:  # the disk has no room for a few kilobytes, so the wrapper takes its memory for a moment
        return _reference(directory)
    if own is None or type(own.model) is not type(whole.model):
        return whole, has_types  # transformers' class is made for other files
    return _join(whole, own), has_types


def _write_small(folder: Path, whole: Tokenizer, files: dict[str, dict[str, Any]]) -> None:
    """Write a model directory with a vocabulary of nothing but special tokens."""
    kept = {
        name: value
        for name, value in files["tokenizer_config.json"].items()
        if name not in _NOT_SETTINGS and not name.endswith("_file")
    }
    for name, value in kept.items():
        if name.endswith("_token") and isinstance(value, dict) and "content" in value:
            kept[name] = value | {"__type": "AddedToken"}  # some releases left this out
    config = {name: files["config.json"][name] for name in _CLASSES_NAMED if name in files["config.json"]}
    written = files | {"config.json": config, "tokenizer_config.json": kept}
    for name, fields in written.items():
        if fields:
            (folder / name).write_text(json.dumps(fields))
    small = Tokenizer(_small_model(whole, _special_tokens(whole, list(written.values()))))
    for step in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        setattr(small, step, getattr(whole, step))
    small.add_tokens(added_tokens(whole))
    small.save(str(folder / "tokenizer.json"))


def _special_tokens(whole: Tokenizer, stated: list[Any]) -> list[str]:
    """Return the strings in the settings and the usual special tokens, as far as the vocabulary has them."""
    found = [token.content for token in added_tokens(whole)]
    found += ["[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]", "<s>", "</s>", "<unk>", "<pad>", "<mask>", "<bos>"]
    found += ["<eos>", "<|endoftext|>"]
    while stated:
        value = stated.pop()
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, dict | list):
            stated += value.values() if isinstance(value, dict) else value
    return [token for token in dict.fromkeys(found) if whole.model.token_to_id(token) is not None]


def _small_model(whole: Tokenizer, tokens: list[str]) -> Any:
    kind: Any = type(whole.model)
    if kind is Unigram:
        return Unigram([(token, 0.0) for token in tokens or ["<unk>"]], unk_id=0)
    options = {name: value for name in OPTIONS[kind] if (value := getattr(whole.model, name)) is not None}
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return kind(vocabulary, [], **options) if kind is BPE else kind(vocabulary, **options)


def _join(whole: Tokenizer, own: Tokenizer) -> Tokenizer:
    """Return the vocabulary of one tokenizer with the steps of another."""
    joined = with_steps(whole, own)
    state = parse_json(own.to_str())
    if state["post_processor"] is not None:
        _renumber(state["post_processor"], joined)
        joined.post_processor = Tokenizer.from_str(json.dumps(state)).post_processor
    return joined


def _renumber(step: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Give the special tokens of a post-processor the numbers that they have in a vocabulary."""

    def number(token: str) -> int:
        if (found := tokenizer.token_to_id(token)) is None:
            raise ValueError(f"the token {token!r}, which its post-processor adds, is not in its vocabulary")
        return found

    for part in step.get("processors", []):
        _renumber(part, tokenizer)
    for name in ("sep", "cls"):
        if name in step:
            step[name][1] = number(step[name][0])
    if step["type"] == "TemplateProcessing":
        for special in step["special_tokens"].values():
            special["ids"] = [number(token) for token in special["tokens"]]
