"""Token ids are those of transformers' tokenizers."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from grating_core import Prompt, Reranker
from grating_core.text.pairs import load_template
from grating_core.text.windows import find_window
from tests.core.conftest import WINDOW, WORDS, save_tokenizer
from tests.core.models.test_decoders import save_decoder

TEXT = st.lists(st.sampled_from([*WORDS[:20], "unknown", "🎉"]), max_size=150).map(" ".join)


@pytest.fixture(scope="module", params=[True, False], ids=["bert", "roberta"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory, types=request.param)
    return directory


@given(query=TEXT.filter(lambda text: len(text.split()) < 50), documents=st.lists(TEXT, max_size=4))
def test_pairs_are_what_transformers_makes_of_them(directory: Path, query: str, documents: list[str]) -> None:
    template = load_template(directory, WINDOW)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    pairs = template.encode(query, documents)
    assert len(pairs) == len(documents)
    for (pair,), document in zip(pairs, documents, strict=True):
        # As a batch: alone, an empty document would be taken for none.
        expected = tokenizer([query], [document], truncation="only_second", max_length=WINDOW)
        assert pair.input_ids == expected["input_ids"][0]
        assert pair.token_type_ids == expected.get("token_type_ids", [[0] * len(pair.input_ids)])[0]
        assert pair.truncated == (len(tokenizer([query], [document])["input_ids"][0]) > WINDOW)


def test_real_text(bundled: Reranker) -> None:
    template = load_template(bundled.model_path, 512)
    tokenizer = AutoTokenizer.from_pretrained(bundled.model_path)
    texts = ["It's naïve—isn't it?", "שלום עולם", "null \x00 byte", "[SEP] [CLS]", "", "東京" * 400]
    expected = tokenizer(["What's that?"] * len(texts), texts, truncation="only_second", split_special_tokens=True)
    assert 102 not in expected["input_ids"][3][7:-1]
    assert [pair.input_ids for (pair,) in template.encode("What's that?", texts)] == expected["input_ids"]


def test_a_query_that_fills_the_window_is_refused(directory: Path) -> None:
    template = load_template(directory, 20)
    with pytest.raises(ValueError, match=r"query has 20 tokens.*window of 20"):
        template.encode(" ".join(WORDS[:20]), ["w1"])


@pytest.mark.parametrize("max_length", [0, 7, -1, WINDOW + 1])
def test_max_length_must_fit_the_model(directory: Path, max_length: int) -> None:
    with pytest.raises(ValueError, match=f"max_length={max_length} "):
        find_window(directory, WINDOW, max_length)


@pytest.mark.parametrize(
    "stated", ["0", "-1", "5", "NaN", "Infinity", "-Infinity", '"512"', "true", "null", "[64]", "1e30", "-0.5"]
)
def test_a_window_that_makes_no_sense_is_ignored(directory: Path, tmp_path: Path, stated: str) -> None:
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    text = json.dumps(settings | {"model_max_length": "here"}).replace('"here"', stated)
    (tmp_path / "tokenizer_config.json").write_text(text)
    assert find_window(tmp_path, 512, None) == 512
    assert find_window(tmp_path, 512, 300) == 300
    assert find_window(tmp_path, 512, None, usual=256) == 256


def test_a_window_larger_than_the_tokenizers(directory: Path) -> None:
    assert find_window(directory, WINDOW + 100, None) == WINDOW
    assert find_window(directory, WINDOW + 100, WINDOW + 100) == WINDOW + 100
    with pytest.raises(ValueError, match=f"use 8 to {WINDOW + 100} tokens"):
        find_window(directory, WINDOW + 100, WINDOW + 101)


def test_the_tail_of_a_text(bundled: Reranker) -> None:
    text = "Naïve 東京 talk. \ud800 🎉 What do bees eat?"
    assert bundled.tail(text, 5) == "What do bees eat?"
    assert bundled.tail(text, 1) == "?"
    assert bundled.tail(text, 100) == text
    assert bundled.tail("", 1) == ""
    with pytest.raises(ValueError, match="tokens=0"):
        bundled.tail(text, 0)
    rest = bundled.tail("word " * 600 + "What do bees eat?", 256)
    assert rest.split() == ["word"] * 251 + ["What", "do", "bees", "eat?"]
    assert bundled.rerank(rest, ["Pollen and nectar."]).trace.truncated == ()


def test_the_tail_as_a_decoders_tokenizer_counts(tmp_path: Path) -> None:
    prompt = Prompt(("<s>", "{query} {document}"), yes="w3", no="w4")
    model = Reranker.from_pretrained(
        save_decoder(tmp_path, "qwen3"), template=prompt, dtype="float32", device="cpu"
    )
    assert model.tail("w1 w2 w3", 2) == "w2 w3"
