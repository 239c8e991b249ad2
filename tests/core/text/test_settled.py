"""What is made without transformers is what transformers makes, whatever the settings; the rest is left to it."""

import json
import random
import shutil
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    DistilBertTokenizer,
    GemmaTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    RobertaTokenizer,
    XLMRobertaTokenizer,
)

from grating_core.text.settled import settled
from tests.core.text.test_backend import ALPHABET, TEXTS

USUAL = ["<s>", "<pad>", "</s>", "<unk>"]
LETTERS = [*"aAbBeEcdilortux.'-", "é", "中", "É", "ﬁ"]
MERGES = [("l", "l"), ("H", "e"), ("o", "r")]


def merged(tokens: list[str]) -> dict[str, int]:
    tokens = [*tokens, *(token for token in ["H", "h", "w"] if token not in tokens), *map("".join, MERGES)]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}


def bytes_of(*tokens: str) -> dict[str, int]:
    return merged([*tokens, *sorted(pre_tokenizers.ByteLevel.alphabet())])


def bert(made: Any = BertTokenizer) -> Any:
    tokens = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *LETTERS,
        *(f"##{letter}" for letter in LETTERS),
        "hello",
        "e",
    ]
    return made({token: number for number, token in enumerate(dict.fromkeys(tokens))})


def xlm_roberta() -> Any:
    pieces = [*USUAL, "▁", "▁He", "llo", "▁w", "orld", *LETTERS, "<mask>"]
    return XLMRobertaTokenizer([(piece, -float(number)) for number, piece in enumerate(dict.fromkeys(pieces))])


def plain() -> Any:
    tokenizer = Tokenizer(
        models.WordLevel({token: number for number, token in enumerate([*USUAL, *LETTERS])}, "<unk>")
    )
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFC(), pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B:1", [("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", bos_token="<s>"
    )


SPACED = ["▁", "▁He", "▁w", *(f"<0x{byte:02X}>" for byte in range(256)), *LETTERS]
MADE: dict[str, Callable[[], Any]] = {
    "bert": bert,
    "electra": bert,
    "distilbert": lambda: bert(DistilBertTokenizer),
    "roberta": lambda: RobertaTokenizer(bytes_of(*USUAL, "<mask>"), MERGES),
    "xlm-roberta": xlm_roberta,
    "gte": xlm_roberta,
    "qwen2": lambda: Qwen2Tokenizer(bytes_of(), MERGES),
    "qwen3": lambda: Qwen2Tokenizer(bytes_of(), MERGES, unk_token=None, eos_token="<|im_end|>"),
    "gemma": lambda: GemmaTokenizer(merged(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *SPACED]), MERGES),
    "llama": lambda: LlamaTokenizer(merged(["<unk>", "<s>", "</s>", *SPACED]), MERGES),
    "modernbert": plain,
    "gpt2": lambda: GPT2Tokenizer(bytes_of("<|endoftext|>"), MERGES),
}
MODELS = {"gpt2": "llama", "gte": "new"}  # what has this tokenizer; the others are named after their model
CLASSES = [
    "BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "RobertaTokenizerFast", "XLMRobertaTokenizer",
    "Qwen2Tokenizer", "GemmaTokenizerFast",
    "LlamaTokenizer", "LlamaTokenizerFast", "GPT2Tokenizer", "PreTrainedTokenizerFast", "TokenizersBackend", None,
]  # fmt: skip
WORDS = ["<s>", "</s>", "[SEP]", "<unk>", "e", "<new>", "<other>"]
TOKENS = st.sampled_from([*WORDS, {"__type": "AddedToken", "content": "<s>", "lstrip": True}])
MAPPED = st.sampled_from([*WORDS, {"content": "<s>", "lstrip": True}])  # as the older file has it
FLAGS = st.sampled_from([True, False])
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(["do_lower_case", "tokenize_chinese_chars", "add_prefix_space", "trim_offsets"], FLAGS),
        **dict.fromkeys(["legacy", "add_bos_token", "add_eos_token", "split_special_tokens"], FLAGS),
        **dict.fromkeys(["sep_token", "unk_token", "bos_token", "cls_token", "image_token"], TOKENS),
        "strip_accents": st.sampled_from([True, False, None]),
        "mask_token": st.sampled_from([None, "[MASK]", "<mask>"]),
        "extra_special_tokens": st.lists(TOKENS, max_size=2) | st.just({}) | st.just({"image": "<new>"}),
        "additional_special_tokens": st.none() | st.lists(st.sampled_from(["<new>", "<other>"]), max_size=2),
        "tokenizer_class": st.sampled_from(CLASSES),
        "model_input_names": st.sampled_from([["input_ids"], ["input_ids", "token_type_ids", "attention_mask"]]),
        "model_max_length": st.just(512),
        "clean_up_tokenization_spaces": FLAGS,
        "unheard_of": FLAGS,
    },
)
TEXT = st.sampled_from(TEXTS) | st.text(ALPHABET, max_size=30)


def write(directory: Path, name: str, fields: dict[str, Any]) -> None:
    if fields:
        (directory / name).write_text(json.dumps(fields))


def read(directory: Path, name: str) -> dict[str, Any]:
    path = directory / name
    return json.loads(path.read_text()) if path.exists() else {}


FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")


def made(directory: Path) -> tuple[Tokenizer, bool] | None:
    file = Tokenizer.from_file(str(directory / "tokenizer.json"))
    return settled(file, {name: read(directory, name) for name in FILES})


def added(directory: Path) -> dict[int, dict[str, Any]]:
    tokens = Tokenizer.from_file(str(directory / "tokenizer.json")).get_added_tokens_decoder()
    return {number: token.__getstate__() for number, token in tokens.items()}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory of each class, as transformers writes it, with an added token."""
    found = {}
    for kind, make in MADE.items():
        found[kind] = tmp_path_factory.mktemp(kind)
        tokenizer = make()
        tokenizer.add_tokens([AddedToken("<new>", lstrip=True, normalized=False)])
        tokenizer.save_pretrained(found[kind])
        write(found[kind], "config.json", {"model_type": MODELS.get(kind, kind)})
    return found


def compare(found: tuple[Tokenizer, bool], directory: Path, pairs: Iterable[tuple[str, str]]) -> None:
    backend, has_types = found
    backend.no_padding()
    backend.no_truncation()
    reference = AutoTokenizer.from_pretrained(directory)
    for one, other in pairs:
        expected, ours = reference([one], [other]), backend.encode(one, other)
        assert ours.ids == expected["input_ids"][0]
        assert has_types == ("token_type_ids" in expected)
        if has_types:
            assert ours.type_ids == expected["token_type_ids"][0]
        assert backend.encode(one, add_special_tokens=False).ids == reference.encode(one, add_special_tokens=False)
        text = reference.decode(ours.ids, clean_up_tokenization_spaces=False)
        assert backend.decode(ours.ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("kind", MADE)
def test_what_transformers_writes_needs_no_transformers(kind: str, directories: dict[str, Path]) -> None:
    source = random.Random(kind)
    texts = TEXTS + ["".join(source.choices(ALPHABET, k=source.randrange(1, 40))) for _ in range(60)]
    found = made(directories[kind])
    assert found is not None
    compare(found, directories[kind], pairwise(texts))


@pytest.mark.parametrize("kind", MADE)
@settings(max_examples=50)
@given(
    changes=SETTINGS,
    specials=st.none() | st.dictionaries(st.sampled_from(["sep_token", "unk_token"]), MAPPED, max_size=1),
    decoder=st.sampled_from(["none", "same", "none", "same", "other flags", "one less", "one more"]),
    listed=st.sampled_from([{}, {}, {"<new>": None}, {"<new>": 7}, {"<s>": 0}]),
    model=st.sampled_from([*[None] * 9, *(MODELS.get(kind, kind) for kind in MADE), "mistral", "mobilebert"]),
    steps=st.sampled_from([{}, {"normalizer": {"type": "Lowercase"}}, {"post_processor": None}]),
    declared=st.sampled_from([{}, {}, {"tokenizer_class": "RobertaTokenizer"}]),
    pair=st.tuples(TEXT, TEXT),
)  # fmt: skip
def test_with_any_settings_it_is_what_transformers_makes(
    kind: str, directories: dict[str, Path], changes: dict[str, Any], specials: dict[str, Any] | None,
    decoder: str, listed: dict[str, int | None], model: str | None, steps: dict[str, Any],
    declared: dict[str, str], pair: tuple[str, str],
) -> None:  # fmt: skip
    with TemporaryDirectory() as folder:
        directory = Path(folder)
        shutil.copytree(directories[kind], directory, dirs_exist_ok=True)
        write(directory, "tokenizer.json", read(directory, "tokenizer.json") | steps)
        tokens = added(directory)
        (new,) = (number for number, token in tokens.items() if token["content"] == "<new>")
        fields = read(directory, "tokenizer_config.json") | changes
        fields["added_tokens_decoder"] = {
            "none": None, "same": tokens, "other flags": tokens | {new: tokens[new] | {"rstrip": True}},
            "one less": {number: token for number, token in tokens.items() if number != new},
            "one more": tokens | {new + 1: tokens[new] | {"content": "<other>"}},
        }[decoder]  # fmt: skip
        if fields["added_tokens_decoder"] is None:
            del fields["added_tokens_decoder"]
        write(directory, "tokenizer_config.json", fields)
        write(directory, "special_tokens_map.json", specials or {})
        write(directory, "added_tokens.json", {token: new if id is None else id for token, id in listed.items()})
        if model is not None:
            write(directory, "config.json", {"model_type": model} | declared)
        found = made(directory)
        if found is not None:
            compare(found, directory, [pair])
