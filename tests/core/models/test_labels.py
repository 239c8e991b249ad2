"""Classifiers with two labels, whose relevant one makes the score, and with others, which have no score."""

import json
import logging
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)

from grating_core import Reranker, UnsupportedModelError
from grating_core.models.labels import read_labels
from tests.core.conftest import DECODER, SIZES, WINDOW, WORDS, randomise, save_tokenizer
from tests.core.parity import TOLERANCE, load, random_text, saved_tokenizer

TWO = SIZES | {"num_labels": 2}
MODELS = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**TWO, max_position_embeddings=WINDOW)),
    "electra": lambda: ElectraForSequenceClassification(
        ElectraConfig(**TWO, max_position_embeddings=WINDOW, embedding_size=32)
    ),
    "qwen3": lambda: Qwen3ForSequenceClassification(Qwen3Config(**TWO, **DECODER)),
}
PAIRS = [("w1 w2", random_text(length, random.Random(length), WORDS)) for length in (0, 1, 30, 90, 7)]


@pytest.fixture(scope="module", params=MODELS)
def two(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a classifier with two labels, whose names say nothing but their numbers."""
    directory = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(5)
    model: PreTrainedModel = randomise(MODELS[request.param]())
    model.save_pretrained(directory)
    save_tokenizer(directory, types=request.param != "qwen3")
    return directory


def named(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@torch.inference_mode()
def logits(directory: Path) -> torch.Tensor:
    tokenizer = saved_tokenizer(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory, attn_implementation="eager").eval()
    batch = tokenizer(*map(list, zip(*PAIRS, strict=True)), padding=True, return_tensors="pt",
                      truncation="only_second", max_length=WINDOW)  # fmt: skip
    found: torch.Tensor = model(**batch).logits
    return found


@pytest.mark.parametrize("settings", [{}, {"memory_budget": "90MB"}, {"slice_tokens": 3}])
def test_the_score_is_the_logit_of_the_relevant_label_less_the_other(two: Path, settings: dict[str, Any]) -> None:
    expected = logits(two)
    scores = load(two, **settings).score(PAIRS)
    assert scores == pytest.approx((expected[:, 1] - expected[:, 0]).tolist(), abs=TOLERANCE)
    assert max(scores) - min(scores) > 100 * TOLERANCE
    ranked = load(two, **settings).rerank("w1 w2", [text for _, text in PAIRS], top_k=5).ranking
    assert {one.index: one.probability for one in ranked} == pytest.approx(
        dict(enumerate(expected.softmax(-1)[:, 1].tolist())), abs=TOLERANCE
    )


def test_the_choice_is_said_in_the_trace_and_once_in_the_log(
    two: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = logits(two)
    directory = Path(shutil.copytree(two, tmp_path / "named"))
    named(directory, id2label={"0": "Relevant", "1": "Not-relevant"}, label2id=None)
    with caplog.at_level(logging.INFO, "grating"):
        reranker = load(directory)
        trace = reranker.rerank("w1 w2", ["w3", "w4"], top_k=1).trace
        reranker.rerank("w1 w2", ["w3", "w4"], top_k=1)
    note = "the score is the logit of label 'Relevant' less that of 'Not-relevant', as their names say"
    assert trace.notes == (note,)
    assert trace.summary()["notes"] == [note]
    assert [record.getMessage() for record in caplog.records].count(f"model {directory}: {note}") == 1
    assert reranker.score(PAIRS) == pytest.approx((expected[:, 0] - expected[:, 1]).tolist(), abs=TOLERANCE)


def test_one_label_needs_no_note(bundled: Reranker) -> None:
    assert bundled.rerank("a", ["b"]).trace.notes == ()


@pytest.mark.parametrize(
    ("names", "relevant", "certain"),
    [
        (("LABEL_0", "LABEL_1"), 1, True),
        (("LABEL_1", "LABEL_0"), 0, True),
        (("YES", "NO"), 0, True),
        (("irrelevant", "relevant"), 1, True),
        (("a", "true"), 1, True),
        (("false", "other"), 1, True),
        (("topic", "negative"), 0, True),
        (("entailment", "not_entailment"), 0, True),
        (("query", "answer"), 1, True),
        (("good", "bad"), 1, False),
        (("yes", "true"), 1, False),
        (("no", "false"), 1, False),
        (("", ""), 1, False),
    ],
)
def test_the_relevant_label_is_found_by_name(names: tuple[str, str], relevant: int, certain: bool) -> None:
    found = read_labels(Path("config.json"), {"id2label": {"1": names[1], "0": names[0]}})
    assert (found.names, found.relevant, found.named) == (names, relevant, certain)
    assert ("do not say" in (found.remark or "")) is not certain


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_labels": 3, "id2label": None}, "3 labels (LABEL_0, LABEL_1, LABEL_2)"),
        ({"id2label": {"0": "contradiction", "1": "entailment", "2": "neutral"}},
         "3 labels (contradiction, entailment, neutral), but a reranker needs one relevance score. Take a model"),
        ({"id2label": {str(number): f"l{number}" for number in range(99)}}, "99 labels (l0, l1, l2, l3, l4, …)"),
        ({"num_labels": 0, "id2label": None}, "0 labels ()"),
        ({"id2label": {"0": "toxic", "1": "rude"}, "problem_type": "multi_label_classification"},
         "problem_type='multi_label_classification' with two labels, toxic, rude"),
    ],
)  # fmt: skip
def test_labels_that_give_no_score_are_refused_by_name(
    two: Path, tmp_path: Path, fields: Any, message: str
) -> None:
    directory = Path(shutil.copytree(two, tmp_path / "model"))
    named(directory, **fields)
    with pytest.raises(UnsupportedModelError) as refusal:
        load(directory)
    assert message in str(refusal.value)
