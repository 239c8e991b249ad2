"""Tokenizers give the ids that transformers' own give, whatever the files beside ``tokenizer.json`` say."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from grating_core import GratingError, Reranker
from grating_core.text.backend import load_backend

TEXTS = [
    "Hello World", "It's NAÏVE—isn't it?", "東京 is ça va", " İstanbul ﬁ [UNK] [SEP] </s> <mask> ",
    "a\x00b\u200bc\n\nd",
    "ÀÉÎ" + "x" * 120, "", "the  <new> world", "🎉",
]  # fmt: skip
ALPHABET = "aAbBeEéÉïßſİ中文 \t.,'-—🎉<>[]/1ﬁ\u0301\u200b"


def write(directory: Path, name: str, fields: object) -> None:
    (directory / name).write_text(json.dumps(fields))


def bert(directory: Path, bundled: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(bundled / name, directory)
    write(directory, "config.json", {"model_type": "bert"})


def roberta(directory: Path, bundled: Path) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *letters, "he", "Ġh", "Ġhe", "wo", "Ġw", "Ġwo", "<mask>"]
    merges = [("h", "e"), ("Ġ", "h"), ("Ġh", "e"), ("w", "o"), ("Ġ", "w"), ("Ġw", "o")]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    write(directory, "tokenizer_config.json", {"tokenizer_class": "RobertaTokenizer"})
    write(directory, "config.json", {"model_type": "roberta"})


def xlm_roberta(directory: Path, bundled: Path) -> None:
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁", "▁He", "llo", "▁w", "orld", *"abcdeilortux.", "<mask>"]
    scores = [(piece, 0.0 if piece.startswith("<") else -float(number)) for number, piece in enumerate(pieces)]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=3))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    write(directory, "tokenizer_config.json", {"tokenizer_class": "XLMRobertaTokenizer"})
    write(directory, "config.json", {"model_type": "xlm-roberta"})


KINDS = {"bert": bert, "roberta": roberta, "xlm-roberta": xlm_roberta}
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "bert": [
        {}, {"do_lower_case": False}, {"strip_accents": True}, {"strip_accents": False},
        {"tokenize_chinese_chars": False}, {"do_lower_case": False, "strip_accents": True},
        {"do_lower_case": None, "tokenizer_class": "BertTokenizerFast"},
        {"do_lower_case": False, "tokenizer_class": "PreTrainedTokenizerFast"}, {"tokenizer_class": None},
        {"sep_token": "[MASK]"}, {"cls_token": "hello"}, {"unk_token": "[PAD]"},
        {"extra_special_tokens": ["<new>"]},
        {"additional_special_tokens": ["<new>", "world"]}, {"model_input_names": ["input_ids", "attention_mask"]},
        {"added_tokens_decoder": None, "mask_token": {"content": "<m>", "__type": "AddedToken", "lstrip": True}},
        {"auto_map": {"AutoTokenizer": ["never.Looked", "never.LookedAt"]}}, {"add_bos_token": True},
    ],
    "roberta": [
        {}, {"add_prefix_space": True}, {"add_prefix_space": False, "trim_offsets": False},
        {"sep_token": "<mask>"},
        {"extra_special_tokens": ["<new>"]}, {"tokenizer_class": None},
        {"tokenizer_class": "PreTrainedTokenizerFast"}, {"errors": "ignore"}, {"cls_token": "<unk>"},
    ],
    "xlm-roberta": [
        {}, {"add_prefix_space": False}, {"add_prefix_space": True}, {"tokenizer_class": None},
        {"extra_special_tokens": ["<new>"]}, {"bos_token": "<mask>"}, {"tokenizer_class": "TokenizersBackend"},
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "settings"), [(kind, settings) for kind, several in SETTINGS.items() for settings in several], ids=str
)
def test_ids_are_those_of_the_reference(
    kind: str, settings: dict[str, Any], bundled: Reranker, tmp_path: Path
) -> None:
    KINDS[kind](tmp_path, bundled.model_path)
    fields = json.loads((tmp_path / "tokenizer_config.json").read_text()) | settings
    write(tmp_path, "tokenizer_config.json", {name: value for name, value in fields.items() if value is not None})
    backend, has_types = load_backend(tmp_path)
    if "auto_map" in settings:  # code that transformers would ask for, and that nobody runs
        write(tmp_path, "tokenizer_config.json", {k: v for k, v in fields.items() if k != "auto_map"})
    reference = AutoTokenizer.from_pretrained(tmp_path)
    source = random.Random(kind + str(settings))
    texts = TEXTS + ["".join(source.choices(ALPHABET, k=source.randrange(1, 40))) for _ in range(60)]
    for query, document in zip(texts, reversed(texts), strict=True):
        expected = reference([query], [document])
        found = backend.encode(query, document)
        assert found.ids == expected["input_ids"][0]
        assert has_types == ("token_type_ids" in expected)
        if has_types:
            assert found.type_ids == expected["token_type_ids"][0]
        assert backend.encode(query, add_special_tokens=False).ids == reference.encode(
            query, add_special_tokens=False
        )


def test_scores_follow_the_settings(bundled: Reranker, tmp_path: Path) -> None:
    """A cased tokenizer of words that are all in lower case knows none of those in upper case."""
    shutil.copytree(bundled.model_path, tmp_path, dirs_exist_ok=True)
    fields = json.loads((tmp_path / "tokenizer_config.json").read_text())
    write(tmp_path, "tokenizer_config.json", fields | {"do_lower_case": False})
    cased = Reranker.from_pretrained(tmp_path, pruning="off", dtype="float32", device="cpu")
    pairs = [("what do bees eat?", "bees eat pollen."), ("What do Bees eat?", "BEES eat pollen.")]
    (lower, upper), expected = cased.score(pairs), bundled.score(pairs)
    assert lower == pytest.approx(expected[0], abs=1e-5)
    assert abs(upper - expected[1]) > 0.1


# Damage


def tokenizer_json(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        fields = json.loads((directory / "tokenizer.json").read_text())
        change(fields)
        write(directory, "tokenizer.json", fields)

    return damage


def settings_json(**fields: object) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        path = directory / "tokenizer_config.json"
        write(directory, path.name, json.loads(path.read_text()) | fields)

    return damage


def text(name: str, data: str | bytes) -> Callable[[Path], None]:
    raw = data.encode() if isinstance(data, str) else data
    return lambda directory: (directory / name).write_bytes(raw) and None


def cut(name: str, part: float) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        whole = (directory / name).read_bytes()
        (directory / name).write_bytes(whole[: int(part * len(whole))])

    return damage


FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
DAMAGE: dict[str, Callable[[Path], None]] = {
    **{
        f"{name} is {data[:8]!r}": text(name, data)
        for name in FILES
        for data in ("", "{", "[]", "null", "7", '"a"', "[" * 100_000, b"\xff\xfe{}", "\x00" * 9)
    },
    **{f"{part} of {name}": cut(name, part) for name in FILES for part in (0.3, 0.9)},
    "tokenizer.json has nothing": text("tokenizer.json", "{}"),
    **{
        f"{step} is {value!r}": tokenizer_json(lambda f, step=step, value=value: f.update({step: value}))
        for step in ("model", "normalizer", "pre_tokenizer", "post_processor", "added_tokens")
        for value in (None, {}, {"type": "Nothing"}, 7)
    },
    **{
        f"the {part} is {value!r}": tokenizer_json(lambda f, p=part, value=value: f["model"].update({p: value}))
        for part in ("vocab", "unk_token", "type")
        for value in (None, {}, [], "BPE", "[NONE]", {"a": -1}, {"a": "b"})
    },
    "no unknown token": tokenizer_json(lambda fields: fields["model"]["vocab"].pop("[UNK]")),
    "no separator": tokenizer_json(lambda f: (f["model"]["vocab"].pop("[SEP]"), f.update(added_tokens=[]))),
    "the separator has another id": tokenizer_json(
        lambda fields: fields["post_processor"]["special_tokens"]["[SEP]"].update(ids=[10**9])
    ),
    "the template lacks a text": tokenizer_json(lambda fields: fields["post_processor"]["pair"].pop(3)),
    "a token twice": tokenizer_json(lambda fields: fields["model"]["vocab"].update({"the": 100})),
    "added tokens far away": tokenizer_json(
        lambda fields: fields["added_tokens"].append(fields["added_tokens"][0] | {"id": 2**31, "content": "<far>"})
    ),
    **{
        f"{name}={value!r}": settings_json(**{name: value})
        for name, value in {
            "do_lower_case": "maybe", "strip_accents": 7, "tokenizer_class": 7, "sep_token": 7,
            "unk_token": "nowhere", "cls_token": {"content": 1}, "added_tokens_decoder": {"a": {}},
            "model_input_names": 7,
            "extra_special_tokens": 7, "additional_special_tokens": {"a": []}, "pad_token": ["a"],
            "mask_token": {}, "tokenizer_file": "/nowhere/tokenizer.json", "vocab_file": "/etc/hostname",
            "tokenize_chinese_chars": [],
        }.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_an_error_that_names_them_or_the_reference_reads_them_alike(
    damage: str, bundled: Reranker, tmp_path: Path
) -> None:
    bert(tmp_path, bundled.model_path)
    DAMAGE[damage](tmp_path)
    refused = None
    try:
        backend, _ = load_backend(tmp_path)
    except GratingError as error:
        refused = str(error)
    if refused is not None:
        assert str(tmp_path) in refused
        assert any(name in refused for name in FILES)
        return
    reference = AutoTokenizer.from_pretrained(tmp_path)
    for query in TEXTS:
        assert backend.encode(query, "x").ids == reference([query], ["x"])["input_ids"][0]
