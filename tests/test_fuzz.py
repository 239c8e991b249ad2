"""Made-up requests, through the core and both adapters: whatever is asked, the answer has its properties.

A request is refused by one of our errors, or answered: with as many documents as were asked for, each once, the
best first, by the scores that the full model gives; whatever their order, and whether layers stay in memory.
"""

from random import Random

import pytest
from langchain_core.documents import Document
from langchain_grating import GratingContextSelector as LangChainSelector
from langchain_grating import GratingCrossEncoder
from langchain_grating import GratingRerank as LangChainRerank
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.postprocessor.grating import GratingContextSelector as LlamaIndexSelector
from llama_index.postprocessor.grating import GratingRerank as LlamaIndexRerank

from grating_core import BudgetError, GratingError, Reranker
from tests.core.conftest import BUNDLED, WORDS, save_model

CLOSE = 2e-4
ODD = [
    "", " ", "\n\t", "\x00", "🦜🦜", "</s>", "<s> w1 </s>", "[SEP]", "[CLS] w2", "\ud800", "a\u202eb", "\u200b",
    "ﬁ", "כמה אנשים", "何人", "w1" * 300, "-" * 400, "{", "[" * 50, "%s {0} {document}", "é", "e\u0301",
]  # fmt: skip
NO_QUERIES = [None, 3, b"w1", ["w1"], float("nan")]
NO_DOCUMENTS = [None, "w1", 3, {"text": "w1"}, [None], ["w1", 3], [b"w1"], [["w1"]], [{"text": "w1"}]]
NO_COUNTS = [0, -1, 2.5, "3", True, float("inf")]


def made_text(random, longest=60):
    if random.random() < 0.25:
        return random.choice(ODD)
    words = random.choices(WORDS, k=random.randrange(longest))
    if words and random.random() < 0.3:
        words[random.randrange(len(words))] = random.choice(ODD)
    return random.choice([" ", " ", "\n", ". "]).join(words)


def made_request(random):
    documents = [made_text(random, random.choice([3, 20, 150])) for _ in range(random.choice([0, 1, 2, 5, 9, 17]))]
    documents += random.choices(documents, k=random.randrange(3)) if documents else []  # some of them twice
    random.shuffle(documents)
    query = made_text(random, 12)
    return (query if query.strip() else random.choice(WORDS)), documents, random.choice([1, 2, 3, 5, 10, 100])


@pytest.fixture(scope="module")
def rerankers(tmp_path_factory):
    """Each model three times: unpruned, pruned, and with as little memory as it takes."""
    found = []
    for family in ("bert", "modernbert-cls", "qwen3"):
        directory = save_model(tmp_path_factory.mktemp(family), family)
        how = {"device": "cpu", "dtype": "float32"}
        with pytest.raises(BudgetError) as refusal:
            Reranker.from_pretrained(directory, memory_budget=1, pruning="off", **how)
        budget = refusal.value.smallest
        found.append(
            (
                Reranker.from_pretrained(directory, pruning="off", **how),
                Reranker.from_pretrained(directory, pruning="cluster", **how),
                Reranker.from_pretrained(directory, pruning="off", memory_budget=budget, **how),
            )
        )
    yield found
    for same in found:
        for reranker in same:
            reranker.close()


def check_ranking(ranking, documents, top_k, scores):
    """The properties of every answer; ``scores`` are those of the documents by the full model."""
    assert len(ranking) == min(top_k, len(documents))
    indices = [ranked.index for ranked in ranking]
    assert len(set(indices)) == len(indices)
    assert all(0 <= index < len(documents) for index in indices)
    assert all(ranked.text == documents[ranked.index] for ranked in ranking)
    found = [ranked.score for ranked in ranking]
    assert found == sorted(found, reverse=True)
    assert found == pytest.approx([scores[index] for index in indices], abs=CLOSE)


def check_core(random, full, pruned, budgeted):
    query, documents, top_k = made_request(random)
    scores = full.score([(query, text) for text in documents])
    best = full.rerank(query, documents, top_k).ranking
    check_ranking(best, documents, top_k, scores)
    found = [ranked.score for ranked in best]
    assert found == pytest.approx(sorted(scores, reverse=True)[: len(best)], abs=CLOSE)
    check_ranking(pruned.rerank(query, documents, top_k).ranking, documents, top_k, scores)
    with_little = budgeted.rerank(query, documents, top_k).ranking
    check_ranking(with_little, documents, top_k, scores)
    assert [ranked.score for ranked in with_little] == pytest.approx(found, abs=CLOSE)
    order = random.sample(range(len(documents)), len(documents))
    permuted = full.rerank(query, [documents[index] for index in order], top_k).ranking
    check_ranking(permuted, [documents[index] for index in order], top_k, [scores[index] for index in order])
    assert [ranked.score for ranked in permuted] == pytest.approx(found, abs=CLOSE)


def check_adapters(random, full):
    query, documents, top_n = made_request(random)
    blank = random.random() < 0.1
    asked = random.choice(["", " ", "\n"]) if blank else query
    best = full.rerank(query, documents, top_n).ranking
    wanted = range(min(top_n, len(documents))) if blank else [ranked.index for ranked in best]
    scores = [None] * len(wanted) if blank else [ranked.probability for ranked in best]

    given = [Document(text, id=str(index)) for index, text in enumerate(documents)]
    kept = LangChainRerank(reranker=full, top_n=top_n).compress_documents(given, asked)
    assert [int(document.id) for document in kept] == list(wanted)
    assert [document.metadata.get("relevance_score") for document in kept] == scores
    assert all(document.metadata == {} for document in given)

    nodes = [NodeWithScore(node=TextNode(text=text, id_=str(index))) for index, text in enumerate(documents)]
    found = LlamaIndexRerank(reranker=full, top_n=top_n).postprocess_nodes(nodes, query_str=asked)
    assert [int(node.node_id) for node in found] == list(wanted)
    assert [node.score for node in found] == scores

    pairs = [(asked, text) for text in documents]
    raw = GratingCrossEncoder(reranker=full, raw_scores=True)
    assert raw.score(pairs) == ([0.0] * len(pairs) if blank else full.score(pairs))

    sizes = {"max_tokens": random.randrange(1, 60), "chunk_tokens": random.randrange(1, 30), "count_tokens": len}
    passages = LangChainSelector(reranker=full, **sizes).compress_documents(given, asked)
    parts = LlamaIndexSelector(reranker=full, **sizes).postprocess_nodes(nodes, query_str=asked)
    texts = [passage.page_content for passage in passages]
    assert [part.node.text for part in parts] == texts
    assert len("\n\n".join(texts)) <= sizes["max_tokens"]
    assert all(any(text in whole for whole in documents) for text in texts)


def check_refusals(random, full):
    query, documents, top_k = made_request(random)
    calls = [
        lambda: full.rerank(random.choice([*NO_QUERIES, "", "  "]), documents, top_k),
        lambda: full.rerank(query, random.choice(NO_DOCUMENTS), top_k),
        lambda: full.rerank(query, documents, random.choice(NO_COUNTS)),
        lambda: full.score([("w1", "w2"), random.choice([("w1",), ("", "w1"), (None, "w1"), 3, "w1", None])]),
    ]
    given = [Document(text) for text in documents]
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in documents]
    for made, right in (
        (LangChainRerank(reranker=full).compress_documents, given),
        (LangChainSelector(reranker=full, max_tokens=9).compress_documents, given),
        (lambda some, asked: LlamaIndexRerank(reranker=full).postprocess_nodes(some, query_str=asked), nodes),
        (LlamaIndexSelector(reranker=full, max_tokens=9).postprocess_nodes, nodes),
    ):
        wrong = random.choice([bad for bad in NO_DOCUMENTS if not isinstance(bad, str)])
        calls += [
            lambda made=made, right=right: made(right, random.choice(NO_QUERIES)),
            lambda made=made, wrong=wrong: made(wrong, query),
        ]
    calls += [
        lambda: LangChainRerank(reranker=full, top_n=random.choice([0, -1, 2.5, "many"])),
        lambda: LlamaIndexRerank(reranker=full, top_n=random.choice([0, -1, 2.5, "many"])),
        lambda: GratingCrossEncoder(reranker=full).score([(random.choice(NO_QUERIES), "w1")]),
    ]
    for call in calls:
        with pytest.raises((ValueError, GratingError)) as refusal:
            call()
        assert str(refusal.value)


def check(random, rerankers):
    chosen = random.choice(rerankers)
    check_core(random, *chosen)
    check_adapters(random, chosen[0])
    check_refusals(random, chosen[0])


@pytest.mark.parametrize("seed", range(20))
def test_requests(rerankers, seed):
    check(Random(seed), rerankers)


def test_requests_of_the_real_model():
    with Reranker.from_pretrained(BUNDLED, device="cpu", dtype="float32", pruning="off") as reranker:
        random = Random(3)
        check_core(random, reranker, reranker, reranker)
        check_adapters(random, reranker)
        check_refusals(random, reranker)


@pytest.mark.slow
def test_many_requests(rerankers):
    for seed in range(1000, 1340):  # of three requests each
        check(Random(seed), rerankers)
