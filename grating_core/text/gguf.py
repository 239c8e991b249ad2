"""transformers makes the tokenizer of a GGUF file."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from grating_core.errors import ModelNotFoundError


def gguf_tokenizer(path: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """Return the tokenizer in a GGUF file, and the settings that prompts need.

    Raises:
        ModelNotFoundError: The tokenizer cannot be read.
    """
    return _tokenizer(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=1)  # loading a model needs the tokenizer twice, and reading it is slow
def _tokenizer(path: Path, changed: int) -> tuple[Tokenizer, dict[str, Any]]:
    try:
        from transformers import AutoTokenizer  # importing transformers takes long

        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    except ImportError as error:
        raise ModelNotFoundError(
            f"the tokenizer in {path} cannot be read without the package gguf: pip install gguf"
        ) from error
    except Exception as error:  # a damaged file may cause any error
        raise ModelNotFoundError(f"the tokenizer in {path} cannot be read: {error}") from error
    names = ("chat_template", "bos_token", "eos_token")
    return tokenizer.backend_tokenizer, {name: getattr(tokenizer, name) for name in names}
