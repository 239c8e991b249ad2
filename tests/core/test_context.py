"""The best passages of long texts within a budget of tokens."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from semantic_text_splitter import TextSplitter
from tokenizers import Tokenizer

from grating_core import Reranker, Route, join_passages, select_context
from grating_core.context import Passage, Source
from tests.core.conftest import WORDS

QUERY = "How many people live in Berlin?"
ANSWER = "Berlin had a population of 3,520,031 registered inhabitants in 2015."
REFERENCE = "\n\n\n".join(topics.values())

COUNTERS: dict[str, Callable[[str], int] | None] = {
    "the reranker's": None,
    "characters": len,
    "with special tokens": lambda text: 2 + len(text.split()),
    "more in the whole than in its parts": lambda text: len(text) ** 2 // 20,
    "fewer in the whole than in its parts": lambda text: int(len(text) ** 0.5),
    "of no system": lambda text: sum(map(ord, text)) % 17,
}
PIECES = ["# Head\n", "\n\n", "\r\n", " ", "\t", ". ", "Berlin", " people", "def f():\n    return 1\n", "🦜",
          "e\u0301", "人口", "\ud800", "\x00", "x" * 150, "- item\n", "```\n"]  # fmt: skip
texts = st.one_of(st.text(max_size=200), st.lists(st.sampled_from(PIECES), min_size=1, max_size=60).map("".join))


def check(passages: list[Passage], documents: list[str], max_tokens: int, count: Callable[[str], int]) -> None:
    """What holds whatever the texts, the budget and the tokenizer are."""
    for passage in passages:
        assert documents[passage.document][passage.start : passage.end] == passage.text
        assert passage.tokens == count(passage.text)
    for before, after in pairwise(passages):
        assert before.document <= after.document
        if before.document == after.document:
            assert documents[before.document][before.end : after.start].strip(), "they adjoin, or overlap"
    if passages:
        assert sum(passage.tokens for passage in passages) <= max_tokens
        assert count(join_passages(passages)) <= max_tokens


@settings(max_examples=60)
@given(
    documents=st.lists(texts, max_size=4),
    max_tokens=st.integers(1, 50),
    chunk_tokens=st.integers(1, 40),
    counter=st.sampled_from(list(COUNTERS)),
)
def test_budget_order_and_positions_hold_for_any_text(
    bundled: Reranker, documents: list[str], max_tokens: int, chunk_tokens: int, counter: str
) -> None:
    count = COUNTERS[counter]
    passages = select_context(
        QUERY, documents, reranker=bundled, max_tokens=max_tokens, chunk_tokens=chunk_tokens, count_tokens=count
    )
    check(passages, documents, max_tokens, count or bundled.count_tokens)
    blank = not any(text.strip() for text in documents)
    if blank:
        assert passages == []
    elif counter in ("the reranker's", "fewer in the whole than in its parts"):  # one character is one token
        assert passages
    if counter in ("the reranker's", "characters"):
        whole = [text for text in documents if text.strip()]
        if (count or bundled.count_tokens)("\n\n".join(whole)) <= max_tokens:
            assert [passage.text for passage in passages] == whole


@pytest.fixture(scope="module")
def chunked(bundled: Reranker) -> tuple[str, list[tuple[int, str]], list[float]]:
    """A text, its chunks of 60 tokens with their places by the library's own splitting, and their scores."""
    text = REFERENCE[:3000] + f"\n\n{ANSWER}\n\n" + REFERENCE[3000:7000]
    tokenizer = Tokenizer.from_file(str(bundled.model_path / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    found = TextSplitter.from_huggingface_tokenizer(tokenizer, 60).chunk_indices(text)
    return text, found, bundled.score([(QUERY, chunk) for _, chunk in found])


def expected(
    reranker: Reranker, found: list[tuple[int, str]], scores: list[float], max_tokens: int
) -> list[tuple[int, int]]:
    """Where the kept chunks are, by the definition of what is kept."""
    chunks = [(start, start + len(chunk)) for start, chunk in found]
    sizes = [reranker.count_tokens(chunk) for _, chunk in found]
    best = sorted(range(len(chunks)), key=lambda index: -scores[index])
    room = max_tokens / (sum(sizes) / len(sizes))
    kept: list[int] = []
    for index in best[: int(room) + (room % 1 > 0)]:
        tried = sorted([*kept, index])
        gaps = ["" if after == before + 1 else "[…]" for before, after in pairwise(tried)]
        joined = "\n".join(found[place][1] + gap for place, gap in zip(tried, [*gaps, ""], strict=True))
        if reranker.count_tokens(joined) <= max_tokens:
            kept.append(index)
    return [chunks[index] for index in sorted(kept)]


@pytest.mark.parametrize("max_tokens", [100, 250, 1000])
def test_keeps_the_best_chunks_for_which_there_is_room(
    bundled: Reranker, chunked: tuple[str, list[tuple[int, str]], list[float]], max_tokens: int
) -> None:
    text, found, scores = chunked
    passages = select_context(QUERY, text, reranker=bundled, max_tokens=max_tokens, chunk_tokens=60)
    check(passages, [text], max_tokens, bundled.count_tokens)
    spans = expected(bundled, found, scores, max_tokens)
    assert len(spans) > 1
    merged = [(passage.start, passage.end) for passage in passages]
    assert all(any(start <= first and last <= end for start, end in merged) for first, last in spans)
    inside = [[span for span in spans if start <= span[0] and span[1] <= end] for start, end in merged]
    assert [(spans[0][0], spans[-1][1]) for spans in inside] == merged
    best = max(passages, key=lambda passage: passage.score or 0)
    assert ANSWER in best.text
    assert best.score is not None
    assert best.score > 5
    assert len(passages) < len(spans) or max_tokens < 1000, "some of so many should adjoin"


def test_what_fits_is_returned_as_it_is_without_computing(tiny_bert: Path) -> None:
    reranker = Reranker.from_pretrained(tiny_bert)
    reranker.close()  # it could not compute
    documents = ["  w1 w2\r\n", "", " \n", "w3 " * 20]
    passages = select_context("w1", documents, reranker=reranker, max_tokens=22, chunk_tokens=8)
    assert passages == [
        Passage(0, 0, 9, "  w1 w2\r\n", None, 2),
        Passage(3, 0, 60, "w3 " * 20, None, 20),
    ]
    with pytest.raises(RuntimeError, match="closed"):
        select_context("w1", documents, reranker=reranker, max_tokens=21, chunk_tokens=8)


def test_a_text_is_a_single_document(bundled: Reranker) -> None:
    text = REFERENCE[:2000]
    one = select_context(QUERY, text, reranker=bundled, max_tokens=100, chunk_tokens=50)
    assert one == select_context(QUERY, [text], reranker=bundled, max_tokens=100, chunk_tokens=50)


def test_documents_keep_their_order_and_are_never_merged(bundled: Reranker) -> None:
    documents = [
        "Bread rises because yeast turns sugar into carbon dioxide. " * 3,
        ANSWER,
        "",
        ANSWER,
        "Bread. " * 9,
    ]
    passages = select_context(QUERY, documents, reranker=bundled, max_tokens=60)
    assert [(passage.document, passage.text) for passage in passages] == [(1, ANSWER), (3, ANSWER)]
    assert join_passages(passages) == f"{ANSWER}\n\n{ANSWER}"


def test_what_is_left_out_within_a_document_is_marked(bundled: Reranker) -> None:
    text = f"{ANSWER}\n\nBread rises because yeast turns sugar into carbon dioxide.\n\n{ANSWER}"
    passages = select_context(QUERY, text, reranker=bundled, max_tokens=40, chunk_tokens=20)
    assert join_passages(passages) == f"{ANSWER}\n\n[…]\n\n{ANSWER}"
    assert join_passages(iter(passages[:1])) == ANSWER
    assert join_passages([]) == ""


def test_one_that_does_not_fit_is_passed_over_for_the_next_best(bundled: Reranker) -> None:
    long = "Many people live in Berlin, and others come to see its museums, its clubs and its parks in summer."
    documents = ["A city has people.", long, ANSWER, "Bread.", "Yeast.", "Sugar."]
    scores = bundled.score([(QUERY, document) for document in documents])
    assert scores[2] > scores[1] > scores[0] > max(scores[3:])
    sizes = [bundled.count_tokens(document) for document in documents]
    passages = select_context(QUERY, documents, reranker=bundled, max_tokens=sizes[2] + sizes[1] - 1)
    found = {passage.document for passage in passages}
    assert {0, 2} <= found
    assert 1 not in found


class Watching:
    """Drops nothing and remembers how many were wanted, of how many."""

    def __init__(self) -> None:
        self.seen: set[tuple[int, int]] = set()

    def route(self, layer: int, scores: list[float], top_k: int) -> list[Route]:
        self.seen.add((len(scores), top_k))
        return [Route.DEFERRED] * len(scores)


def test_pruning_is_told_how_many_chunks_the_budget_holds(tiny_bert: Path) -> None:
    watching = Watching()
    text = "\n\n".join(" ".join(WORDS[number : number + 10]) for number in range(100))
    with Reranker.from_pretrained(tiny_bert, pruning=watching) as reranker:
        passages = select_context("w1", text, reranker=reranker, max_tokens=95, chunk_tokens=10)
    assert watching.seen == {(100, 10)}
    check(passages, [text], 95, lambda text: len(text.split()))


def test_a_book_of_thousands_of_chunks(tiny_bert: Path) -> None:
    book = "\n\n".join(" ".join(WORDS[number % 190 : number % 190 + 10]) + "." for number in range(5000))
    with Reranker.from_pretrained(tiny_bert) as reranker:
        passages = select_context("w1 w17", book, reranker=reranker, max_tokens=20_000, chunk_tokens=11)
        check(passages, [book], 20_000, reranker.count_tokens)
        assert sum(passage.tokens for passage in passages) > 18_000


def test_a_word_longer_than_the_budget_is_divided(bundled: Reranker) -> None:
    text = f"{'x' * 3000} {ANSWER} {'y' * 3000}"
    passages = select_context(QUERY, text, reranker=bundled, max_tokens=150, count_tokens=len)
    check(passages, [text], 150, len)
    assert any("3,520,031" in passage.text for passage in passages)


@pytest.mark.parametrize("make", [
    lambda size: "".join(f'{{"id":{number},"k":["{number:x}",null]}},' for number in range(size // 20))[:size],
    lambda size: "天地玄黄宇宙洪荒" * (size // 8),
    lambda size: "x" * size,
    lambda size: "a" + "\n" * size + "b",
], ids=["JSON", "Chinese", "one letter", "line breaks"])  # fmt: skip
def test_a_text_without_spaces_is_divided_in_linear_time(make: Callable[[int], str]) -> None:
    read = []

    def count(text: str) -> int:
        read.append(len(text))
        return len(text) // 4

    text = make(50_000)
    chunks = list(Source([text], count).chunks(256, 1000))
    few = sum(read)
    assert "".join(chunk.text for chunk in chunks) == text.replace("\n", "")
    assert all(0 <= chunk.tokens <= 256 for chunk in chunks)
    read.clear()
    assert len(list(Source([make(200_000)], count).chunks(256, 1000))) >= len(chunks)
    assert sum(read) < 5 * few + 10_000


def test_the_end_of_a_long_query_is_used(bundled: Reranker) -> None:
    query = "word " * 600 + QUERY
    texts = ["Bread rises.", ANSWER, "Yeast turns sugar into gas.", "Berlin has many museums."]
    found = select_context(query, texts, reranker=bundled, max_tokens=25, chunk_tokens=20)
    assert found == select_context(bundled.tail(query), texts, reranker=bundled, max_tokens=25, chunk_tokens=20)
    assert found[0].score is not None


def test_pruning_and_a_memory_budget_find_the_same(bundled: Reranker) -> None:
    text = f"{REFERENCE[:6000]}\n\n{ANSWER}\n\n{REFERENCE[6000:12000]}"
    wanted = select_context(QUERY, text, reranker=bundled, max_tokens=300, chunk_tokens=100)
    with Reranker.from_pretrained(
        "bundled:ms-marco-minilm-l12", dtype="float32", device="cpu", memory_budget="150MB"
    ) as reranker:
        found = select_context(QUERY, text, reranker=reranker, max_tokens=300, chunk_tokens=100)
    assert [(passage.start, passage.end) for passage in found] == [(p.start, p.end) for p in wanted]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"query": " "}, "query=' '"),
        ({"query": None}, "query=None"),
        ({"text_or_documents": None}, "text_or_documents must be a text or a list of texts"),
        ({"text_or_documents": ["a", 1]}, r"text_or_documents\[1\] is a int"),
        ({"text_or_documents": b"bytes"}, "text_or_documents must be a text or a list of texts, not a bytes"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_tokens": 9.5}, "max_tokens=9.5"),
        ({"max_tokens": True}, "max_tokens=True"),
        ({"chunk_tokens": 0}, "chunk_tokens=0"),
        ({"chunk_tokens": 513}, "chunk_tokens=513 is more than the reranker reads, 512 tokens"),
        ({"reranker": "bundled:ms-marco-minilm-l12"}, "reranker='bundled:ms-marco-minilm-l12' must be a Reranker"),
        ({"count_tokens": "gpt-4"}, "count_tokens='gpt-4' must be a function"),
        ({"count_tokens": str.split}, "count_tokens must return a whole number, not a list"),
    ],
)
def test_bad_arguments_are_named(bundled: Reranker, arguments: dict[str, object], told: str) -> None:
    usual = {"query": QUERY, "text_or_documents": "text", "reranker": bundled, "max_tokens": 100}
    with pytest.raises(ValueError, match=told):
        select_context(**(usual | arguments))


def test_an_error_of_the_counter_reaches_the_caller(bundled: Reranker) -> None:
    def count(text: str) -> int:
        if "<|" in text:
            raise ZeroDivisionError(text)
        return len(text)

    with pytest.raises(ZeroDivisionError):
        select_context(QUERY, "word " * 50 + "<|end|>", reranker=bundled, max_tokens=100, count_tokens=count)
