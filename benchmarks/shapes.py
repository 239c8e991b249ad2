"""Checkpoints with the shape of a real model and random weights, and texts for any checkpoint.

Memory and time do not depend on what the weights say, so a model that cannot be fetched can still be measured.
"""

from __future__ import annotations

import random
import shutil
import string
import tempfile
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForSequenceClassification, XLMRobertaConfig, XLMRobertaTokenizer

_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
_LETTERS = string.ascii_lowercase + "éüñабвгд中文字"
_VOCABULARY = 250_002
_START = "▁"  # how a Unigram vocabulary marks the beginning of a word


def write_m3_shape(directory: Path, *, layers: int = 24, seed: int = 0) -> Path:
    """A checkpoint shaped like ``BAAI/bge-reranker-v2-m3``, written if it is not there yet.

    Args:
        directory: Where it goes: 1.1 GB of bfloat16 weights in one file, and the tokenizer.
        layers: The real model has 24.
        seed: Of weights and vocabulary.

    Returns:
        The directory.
    """
    if directory.is_dir():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Made under another name and renamed when complete: whoever sees the directory sees a finished one.
    unfinished = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        tokenizer = XLMRobertaTokenizer(vocab=_unigram_vocabulary(seed), model_max_length=8192)
        tokenizer.save_pretrained(unfinished)
        _random_m3(layers, seed).save_pretrained(unfinished, max_shard_size="10GB")
        unfinished.rename(directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return directory


def random_texts(directory: Path, count: int, tokens: int, *, seed: int = 0) -> list[str]:
    """Texts of words that the tokenizer of a model directory knows.

    Words are drawn by Zipf's law: as in natural text a few come again and again and most are rare, which matters
    to whoever keeps the embeddings of frequent tokens at hand.

    Args:
        directory: Holds ``tokenizer.json``.
        count: How many texts.
        tokens: Their mean length without special tokens; lengths are uneven, within 10 % of it.
        seed: Of lengths and words.
    """
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    words = _words(tokenizer)
    chance = random.Random(seed)
    chance.shuffle(words)
    frequencies = list(accumulate(1 / rank for rank in range(1, len(words) + 1)))
    texts = []
    for _ in range(count):
        length = round(tokens * chance.uniform(0.9, 1.1))
        text = " ".join(chance.choices(words, cum_weights=frequencies, k=length))
        # A word is one token or more: cut after as many tokens as are wanted.
        offsets = tokenizer.encode(text, add_special_tokens=False).offsets
        texts.append(text[: offsets[length - 1][1]])
    return texts


def _words(tokenizer: Tokenizer) -> list[str]:
    """The whole words of a Unigram or WordPiece vocabulary, in the order of their ids."""
    ids = tokenizer.get_vocab()
    pieces = sorted(ids, key=ids.__getitem__)
    if marked := [piece.removeprefix(_START) for piece in pieces if piece.startswith(_START)]:
        pieces = marked
    return [piece for piece in pieces if piece.isalpha() and len(piece) > 1]


def _random_m3(layers: int, seed: int) -> Any:
    config = XLMRobertaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=16,
        intermediate_size=4096,
        max_position_embeddings=8194,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        pad_token_id=1,
    )
    config.num_labels = 1
    torch.manual_seed(seed)
    # transformers draws weights with a standard deviation of 0.02, norms are 1 and biases 0.
    architecture: Any = AutoModelForSequenceClassification
    return architecture.from_config(config, dtype=torch.bfloat16)


def _unigram_vocabulary(seed: int) -> list[tuple[str, float]]:
    """Pieces and their log probabilities: special tokens, single characters, and random words and endings."""
    chance = random.Random(seed)
    pieces = dict.fromkeys((*_SPECIAL, _START, *string.printable.strip(), *_LETTERS))
    while len(pieces) < _VOCABULARY - 1:
        letters = "".join(chance.choices(_LETTERS, k=chance.randint(2, 9)))
        pieces[chance.choice((_START, "")) + letters] = None
    pieces["<mask>"] = None
    # So flat that one long piece is always likelier than two short ones.
    return [(piece, 0.0 if rank < len(_SPECIAL) else -8 - rank / 50_000) for rank, piece in enumerate(pieces)]
