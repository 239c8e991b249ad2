"""The public contract, on the real model."""

import asyncio
import gc
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from grating_core import ClusterPolicy, Request, Reranker
from tests.core.conftest import BUNDLED
from tests.core.parity import load
from tests.core.policies import StandsStill

QUERY = "How many people live in Berlin?"
DOCUMENTS = [
    "New York City is famous for the Metropolitan Museum of Art.",
    "Berlin has a population of 3,520,031 registered inhabitants.",
    "Berlin is well known for its museums.",
]


@pytest.mark.parametrize("scores", ["exact", "estimated"])
def test_no_documents_give_an_empty_ranking(bundled: Reranker, scores: str) -> None:
    result = bundled.rerank(QUERY, [], scores=scores)
    assert result.ranking == []
    assert result.trace.layers == ()


@pytest.mark.parametrize(
    ("query", "documents", "options", "told"),
    [
        ("", DOCUMENTS, {}, "query=''"),
        (" \n", DOCUMENTS, {}, "query="),
        (None, DOCUMENTS, {}, "query=None"),
        (QUERY, DOCUMENTS, {"top_k": 0}, "top_k=0"),
        (QUERY, [], {"top_k": -1}, "top_k=-1"),
        (QUERY, DOCUMENTS, {"top_k": 2.0}, r"top_k=2\.0"),
        (QUERY, DOCUMENTS, {"top_k": True}, "top_k=True"),
        (QUERY, ["a", None, "b"], {}, r"documents\[1\] is a NoneType"),
        (QUERY, ["a", "b", b"c"], {}, r"documents\[2\] is a bytes"),
        (QUERY, "one string", {}, "documents must be a list.*not a str"),
        (QUERY, None, {}, "documents must be a list.*not a NoneType"),
        (QUERY, DOCUMENTS, {"scores": "rough"}, "scores='rough'"),
        (QUERY, DOCUMENTS, {"score_threshold": 1.5}, "score_threshold=1.5 must be a probability"),
        (QUERY, DOCUMENTS, {"score_threshold": -3.5}, "score_threshold=-3.5 must be a probability"),
        (QUERY, DOCUMENTS, {"score_threshold": float("nan")}, "score_threshold=nan must be a finite number"),
        (QUERY, DOCUMENTS, {"score_threshold": "0.5"}, "score_threshold='0.5' must be a finite number"),
        (QUERY, DOCUMENTS, {"score_threshold": float("inf"), "raw_scores": True}, "score_threshold=inf"),
        (QUERY, DOCUMENTS, {"score_threshold": 0.5, "scores": "estimated"}, "score_threshold=0.5 and scores="),
        ("word " * 600, DOCUMENTS, {}, r"query has 600 tokens.*512"),
    ],
)
def test_bad_input_is_refused_by_name(bundled: Reranker, query, documents, options, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        bundled.rerank(query, documents, **options)


@pytest.mark.parametrize(
    ("pairs", "told"),
    [
        ([(QUERY, "a"), ("", "b")], r"pairs\[1\]"),
        ([(QUERY, None)], r"pairs\[0\]"),
        ([("a", "b", "c")], r"pairs\[0\]"),
        (["ab"], r"pairs\[0\]"),
        ([5], r"pairs\[0\]"),
    ],
)
def test_bad_pairs_are_refused_by_index(bundled: Reranker, pairs, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        bundled.score(pairs)


@pytest.mark.parametrize(
    "setting",
    [{"device": "gpu"}, {"dtype": "int4"}, {"pruning": "hard"}, {"pruning": 3}, {"memory_budget": "a lot"},
     {"memory_budget": 0}, {"memory_budget": True}, {"memory_budget": "-3MB"}, {"memory_budget": 1.5},
     {"max_length": 1000}],
)  # fmt: skip
def test_unusable_settings_are_refused_by_name(setting: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(setting))}="):
        Reranker.from_pretrained(BUNDLED, **setting)


def test_the_best_come_first(bundled: Reranker) -> None:
    result = bundled.rerank(QUERY, DOCUMENTS, top_k=2)
    assert [ranked.index for ranked in result.ranking] == [1, 2]
    assert [ranked.text for ranked in result.ranking] == [DOCUMENTS[1], DOCUMENTS[2]]
    assert result.ranking[0].score > 5 > result.ranking[1].score
    assert len(bundled.rerank(QUERY, DOCUMENTS, top_k=99).ranking) == 3


@pytest.mark.parametrize("pruning", ["auto", "cluster", "off"])
def test_odd_texts(bundled: Reranker, pruning: str) -> None:
    documents = ["", " ", "🎉", "null\x00byte", "شكرا جزيلا", "\u202eto the left", "a" * 10_000, "half \ud83d",
                 "word " * 3000, *DOCUMENTS, "[SEP] [CLS] <s>"]  # fmt: skip
    result = load(bundled.model_path, pruning=pruning).rerank(QUERY, documents, top_k=4)
    assert len(result.ranking) == 4
    assert result.ranking[0].index == 10
    assert result.trace.truncated == (8,)
    assert result.trace.lengths[8] == 512


def test_one_candidate_and_a_thousand(tiny_bert: Path) -> None:
    reranker = load(tiny_bert, pruning="cluster")
    assert [r.index for r in reranker.rerank("w1", ["w2"], 5).ranking] == [0]
    documents = [f"w{n % 200} w{n // 200}" for n in range(1000)]
    found = reranker.rerank("w1", documents, 10)
    assert len({ranked.index for ranked in found.ranking}) == 10
    full = load(tiny_bert).score([("w1", document) for document in documents])
    assert [r.score for r in found.ranking] == pytest.approx([full[r.index] for r in found.ranking], abs=1e-4)


def test_duplicates_are_all_kept(bundled: Reranker) -> None:
    result = bundled.rerank(QUERY, [*DOCUMENTS, *DOCUMENTS], top_k=4)
    assert sorted(ranked.index for ranked in result.ranking) == [1, 2, 4, 5]
    assert result.ranking[0].score == pytest.approx(result.ranking[1].score, abs=1e-4)


def test_a_threshold_leaves_out_what_is_less_probable(bundled: Reranker) -> None:
    everything = bundled.rerank(QUERY, DOCUMENTS, 3).ranking
    assert [one.probability for one in everything] == [bundled.probability(one.score) for one in everything]
    for place, one in enumerate(everything):
        for asked in (
            {"score_threshold": one.probability},
            {"score_threshold": one.score, "raw_scores": True},
        ):
            (many,) = bundled.rerank_many([Request(QUERY, DOCUMENTS, 3, **asked)])
            awaited = asyncio.run(bundled.arerank(QUERY, DOCUMENTS, 3, **asked))
            for found in (bundled.rerank(QUERY, DOCUMENTS, 3, **asked), many, awaited):
                assert found.ranking == everything[: place + 1]
    nothing = bundled.rerank("Who discovered penicillin?", DOCUMENTS, 3, score_threshold=0.5)
    assert nothing.ranking == []
    assert len(nothing.trace.layers[-1].alive) == 3
    assert bundled.rerank(QUERY, DOCUMENTS, 3, score_threshold=0.0).ranking == everything  # as FlashRank's default


def test_score_keeps_the_order_of_pairs_with_different_queries(bundled: Reranker) -> None:
    pairs = [(QUERY, DOCUMENTS[1]), ("museum in New York", DOCUMENTS[0]), (QUERY, DOCUMENTS[0])]
    assert bundled.score(pairs) == pytest.approx([bundled.score([pair])[0] for pair in pairs], abs=1e-4)
    assert bundled.score([]) == []
    ranked = {r.index: r.score for r in bundled.rerank(QUERY, DOCUMENTS).ranking}
    assert bundled.score([(QUERY, text) for text in DOCUMENTS]) == pytest.approx([ranked[i] for i in range(3)])


def test_max_length_cuts_documents(bundled: Reranker) -> None:
    short = load(bundled.model_path, max_length=20)
    result = short.rerank(QUERY, DOCUMENTS)
    assert short.max_length == 20
    assert max(result.trace.lengths) == 20
    assert result.trace.truncated == (0, 1)


def test_threads_and_asyncio_get_the_same_answers(bundled: Reranker) -> None:
    queries = [f"{QUERY} {number}" for number in range(8)]
    expected = [bundled.rerank(query, DOCUMENTS).ranking for query in queries]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda query: bundled.rerank(query, DOCUMENTS).ranking, queries))
    assert found == expected

    async def together() -> list:
        return await asyncio.gather(*(bundled.arerank(query, DOCUMENTS) for query in queries))

    assert [result.ranking for result in asyncio.run(together())] == expected


async def test_arerank_leaves_the_event_loop_free(bundled: Reranker) -> None:
    beats = 0

    async def beat() -> None:
        nonlocal beats
        while True:
            await asyncio.sleep(0.005)
            beats += 1

    heart = asyncio.create_task(beat())
    await bundled.arerank(QUERY, [" ".join(DOCUMENTS) * 5] * 20)
    heart.cancel()
    assert beats > 5


async def test_a_cancelled_arerank_stops_computing(tiny_bert: Path) -> None:
    policy = StandsStill()
    with load(tiny_bert, pruning=policy) as reranker, ThreadPoolExecutor(1) as one:
        asyncio.get_running_loop().set_default_executor(one)
        task = asyncio.create_task(reranker.arerank("w1", ["w2", "w3"], top_k=1))
        while not policy.reached.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        policy.go.set()
        result = await reranker.arerank("w1", ["w2", "w3"], top_k=1)  # once the only thread is free again
    assert policy.layers == [1, *range(1, result.trace.depth)]


def test_a_closed_reranker_says_so(tiny_bert: Path) -> None:
    with load(tiny_bert) as reranker:
        assert reranker.model_path == tiny_bert
        reranker.rerank("w1", ["w2"])
    for call in (lambda: reranker.rerank("w1", ["w2"]), lambda: reranker.score([("w1", "w2")])):
        with pytest.raises(RuntimeError, match="closed"):
            call()


def test_shared_rerankers_are_loaded_once_and_let_go(tiny_bert: Path) -> None:
    settings = {"device": "cpu", "dtype": "float32"}
    found: list[Reranker] = []
    threads = [
        threading.Thread(target=lambda: found.append(Reranker.shared(tiny_bert, **settings))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(reranker) for reranker in found}) == 1
    assert Reranker.shared(tiny_bert, pruning=ClusterPolicy(1.0), **settings) is not found[0]
    held = weakref.ref(found[0])
    found.clear()
    del threads
    gc.collect()
    assert held() is None


def test_a_shared_policy_must_be_hashable(tiny_bert: Path) -> None:
    class Unhashable(list):
        def route(self, layer, scores, top_k):
            raise NotImplementedError

    with pytest.raises(ValueError, match="pruning="):
        Reranker.shared(tiny_bert, pruning=Unhashable())


def test_a_reranker_can_be_pickled(tiny: Path) -> None:
    reranker = load(tiny)
    twin = pickle.loads(pickle.dumps(reranker))
    assert twin.rerank("w1", ["w2", "w3 w4"]).ranking == reranker.rerank("w1", ["w2", "w3 w4"]).ranking


def test_the_trace_tells_what_was_computed(bundled: Reranker) -> None:
    trace = bundled.rerank(QUERY, DOCUMENTS, top_k=1).trace
    assert [layer.layer for layer in trace.layers] == list(range(1, 13)) == list(range(1, trace.depth + 1))
    assert all(layer.alive == (0, 1, 2) and layer.tokens == sum(trace.lengths) for layer in trace.layers)
    assert trace.compute_share == 1.0
    assert 0 < sum(layer.seconds for layer in trace.layers) <= trace.seconds
