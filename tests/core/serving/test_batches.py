"""Batches of pandas and of NumPy get the scores of the library, whatever their rows are."""

import pickle
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from grating_core import Request, Reranker
from grating_core.serving.batches import BatchReranker
from tests.core.conftest import WORDS

Rows = dict[str, list[Any]]
Make = Callable[[Rows], Any]


def of_numpy(rows: Rows) -> dict[str, Any]:
    """Make a batch of NumPy, with arrays of texts in an array of objects, as Ray Data does it."""
    cells = {
        name: [np.array(value, dtype=object) if isinstance(value, list) else value for value in values]
        for name, values in rows.items()
    }
    return {name: np.fromiter(values, dtype=object, count=len(values)) for name, values in cells.items()}


def of_pandas(rows: Rows) -> Any:
    return pytest.importorskip("pandas").DataFrame(rows, index=range(7, 7 + len(next(iter(rows.values())))))


@pytest.fixture(params=[of_numpy, of_pandas])
def make(request: pytest.FixtureRequest) -> Make:
    return request.param


@pytest.fixture(scope="module")
def rank(tiny_bert: Path) -> BatchReranker:
    return BatchReranker(tiny_bert, top_k=3, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def library(tiny_bert: Path) -> Reranker:
    return Reranker.from_pretrained(tiny_bert, device="cpu", dtype="float32")


def text(random: Random, longest: int = 120) -> str:
    return " ".join(random.choices(WORDS, k=random.randint(1, longest)))


def requests(count: int) -> Rows:
    """Make requests with 0 to 6 documents, some of them longer than the window."""
    random = Random()
    documents = [[text(random) for _ in range(number % 7)] for number in range(count)]
    return {"id": list(range(count)), "query": [text(random, 9) for _ in range(count)], "documents": documents}


def test_a_row_with_documents_gets_their_ranking(rank: BatchReranker, library: Reranker, make: Make) -> None:
    rows = requests(20)
    batch = rank(make(rows))
    assert list(batch) == ["id", "query", "documents", "ranking", "scores", "probabilities"]
    assert list(batch["id"]) == rows["id"]
    wanted = library.rerank_many(map(Request, rows["query"], rows["documents"], [3] * 20))
    for ranking, scores, result in zip(batch["ranking"], batch["scores"], wanted, strict=True):
        assert ranking == [ranked.index for ranked in result.ranking]
        assert scores == pytest.approx([ranked.score for ranked in result.ranking], abs=1e-4)
    for probabilities, scores in zip(batch["probabilities"], batch["scores"], strict=True):
        assert probabilities == [library.probability(score) for score in scores]


def test_a_row_with_a_text_gets_its_score(rank: BatchReranker, library: Reranker, make: Make) -> None:
    random = Random()
    rows = {"query": [text(random, 9) for _ in range(12)], "text": [text(random) for _ in range(12)]}
    batch = rank(make(rows))
    assert list(batch["query"]) == rows["query"]
    assert batch["score"].dtype == np.float64
    wanted = library.score(zip(rows["query"], rows["text"], strict=True))
    assert list(batch["score"]) == pytest.approx(wanted, abs=1e-4)
    assert list(batch["probability"]) == [library.probability(score) for score in batch["score"]]


def test_the_rows_of_a_data_frame_keep_their_names(rank: BatchReranker) -> None:
    frame = of_pandas(requests(5))
    assert list(rank(frame).index) == list(frame.index)
    assert list(frame) == ["id", "query", "documents"]  # the caller's own is not changed


@pytest.mark.parametrize(
    "added", [("documents", ["ranking", "scores", "probabilities"]), ("text", ["score", "probability"])], ids=str
)
def test_an_empty_batch_gets_empty_columns(rank: BatchReranker, make: Make, added: tuple[str, list[str]]) -> None:
    batch = rank(make({"query": [], added[0]: []}))
    assert {name: len(batch[name]) for name in added[1]} == dict.fromkeys(added[1], 0)


def test_what_cannot_be_ranked_is_named(rank: BatchReranker, make: Make) -> None:
    with pytest.raises(ValueError, match=r"query and documents, or query and text, not \['passage', 'query'\]"):
        rank(make({"query": ["w1"], "passage": ["w2"]}))
    with pytest.raises(ValueError, match=r"requests\[1\]: documents must be a list of strings, not a str"):
        rank(make({"query": ["w1", "w2"], "documents": [["w3"], "w4"]}))
    with pytest.raises(ValueError, match=r"requests\[0\]: documents\[1\] is a NoneType"):
        rank(make({"query": ["w1"], "documents": [["w3", None]]}))


def test_settings_are_checked_at_once() -> None:
    with pytest.raises(ValueError, match="top_k"):
        BatchReranker("any", top_k=0)
    with pytest.raises(ValueError, match="target"):
        BatchReranker("any", target=2)


def test_a_copy_in_another_process_has_the_settings_but_no_token(tiny_bert: Path, make: Make) -> None:
    rank = BatchReranker(tiny_bert, top_k=2, device="cpu", dtype="float32", token="secret")
    rows = make(requests(8))
    wanted = rank(rows)
    pickled = pickle.dumps(rank)
    assert b"secret" not in pickled
    found = pickle.loads(pickled)(rows)
    assert list(found["ranking"]) == list(wanted["ranking"])
