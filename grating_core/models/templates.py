"""Pairs of query and document as token ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from grating_core.errors import ModelNotFoundError, UnsupportedModelError

_TYPES = ("token_type_ids",)


@dataclass(frozen=True)
class TokenisedPair:
    """One query and one document as one sequence.

    Attributes:
        input_ids: Token ids, with the special tokens of the model.
        token_type_ids: 0 or 1 for each token; which text it belongs to, if the model cares.
        truncated: Whether the end of the document did not fit into the window.
    """

    input_ids: list[int]
    token_type_ids: list[int]
    truncated: bool


class PairTemplate:
    """The template of encoder rerankers: both texts joined by the tokenizer's own special tokens.

    Only the document is ever cut, never the query: a pair is then about the same question for every
    document. Within the window the token ids are exactly those of ``tokenizer(query, document)``.

    Args:
        backend: A tokenizer of the tokenizers library.
        window: The most tokens a pair may have.
        has_types: Whether the model is to know which text a token belongs to.
    """

    def __init__(self, backend: Tokenizer, window: int, *, has_types: bool) -> None:
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._has_types = has_types
        self._special_tokens = backend.num_special_tokens_to_add(is_pair=True)
        self.window = window

    def encode(self, query: str, documents: Sequence[str]) -> list[TokenisedPair]:
        """Tokenise a query with each of the documents.

        Raises:
            ValueError: The query alone fills the window.
        """
        question = self._backend.encode(_encodable(query), add_special_tokens=False)
        room = self.window - self._special_tokens - len(question)
        if room < 1:
            raise ValueError(
                f"query has {len(question)} tokens, which leaves no room for a document in the model's window "
                f"of {self.window} tokens; shorten the query"
            )
        bodies = self._backend.encode_batch([_encodable(text) for text in documents], add_special_tokens=False)
        return [self._join(question, body, room) for body in bodies]

    def _join(self, question: Any, body: Any, room: int) -> TokenisedPair:
        truncated = len(body) > room
        if truncated:
            body.truncate(room)
        pair = self._backend.post_process(question, body)
        types = pair.type_ids if self._has_types else [0] * len(pair)
        return TokenisedPair(pair.ids, types, truncated)


def _encodable(text: str) -> str:
    """Half characters (lone surrogates, as broken JSON leaves them) become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def find_window(directory: Path, model_window: int, max_length: int | None) -> int:
    """The most tokens a pair may have.

    Args:
        directory: Where the tokenizer's files are.
        model_window: The most tokens that the model itself can take.
        max_length: A smaller window asked for by the user, or None.

    Raises:
        ModelNotFoundError: The tokenizer's settings are damaged.
        ValueError: ``max_length`` is not between 8 and the model's window.
    """
    stated = _read_settings(directory).get("model_max_length")
    window = min(model_window, int(stated)) if isinstance(stated, int | float) else model_window
    if max_length is not None and not 8 <= max_length <= window:
        raise ValueError(
            f"max_length={max_length} does not fit this model; use 8 to {window} tokens, or None for {window}"
        )
    return max_length or window


def load_template(directory: Path, window: int) -> PairTemplate:
    """The pair template of a model directory.

    ``tokenizer.json`` is read as it is: transformers' wrapper around it keeps copies of the vocabulary, which for
    250,000 entries takes another 130 MB.

    Args:
        directory: Where the tokenizer's files are.
        window: The most tokens a pair may have.

    Raises:
        ModelNotFoundError: The tokenizer's files are missing or damaged, or need a package that is not there.
        UnsupportedModelError: The tokenizer has no Rust backend.
    """
    # Without any of them transformers makes up an empty vocabulary, and every text becomes the same.
    if not any(list(directory.glob(pattern)) for pattern in ("tokenizer.json", "vocab.*", "*.model")):
        raise ModelNotFoundError(f"{directory} has no tokenizer.json, vocabulary or sentencepiece model")
    settings = _read_settings(directory)
    named = getattr(transformers, str(settings.get("tokenizer_class")), None)
    inputs: Any = settings.get("model_input_names") or getattr(named, "model_input_names", _TYPES)
    backend: Any
    try:
        if (directory / "tokenizer.json").is_file():
            backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
        else:
            tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
            inputs, backend = tokenizer.model_input_names, getattr(tokenizer, "backend_tokenizer", None)
    except Exception as error:  # the tokenizers library raises plain Exception for damaged files
        raise ModelNotFoundError(f"the tokenizer in {directory} cannot be loaded: {error}") from error
    if backend is None:
        raise UnsupportedModelError(f"{directory} has a tokenizer without tokenizer.json; convert it to that form")
    return PairTemplate(backend, window, has_types=_TYPES[0] in inputs)


def _read_settings(directory: Path) -> dict[str, Any]:
    path = directory / "tokenizer_config.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except (ValueError, TypeError, OSError) as error:
        raise ModelNotFoundError(f"{path} cannot be read: {error}") from error
