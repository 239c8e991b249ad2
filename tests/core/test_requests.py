"""Requests, their checks, and what they have in common when they go through the layers together."""

import asyncio
import random
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from grating_core import ClusterPolicy, Request, Reranker, RerankResult, Route
from grating_core.errors import ScoreError
from grating_core.kernels.choice import kernels
from grating_core.lens import recalibrate as recalibration
from grating_core.pruning import Off
from tests.core.conftest import BUNDLED, WORDS, save_model, torch_threads
from tests.core.memory.conftest import PLANS, load_planned
from tests.core.memory.test_parity import DropHalf
from tests.core.models.test_decoders import PROMPT, save_decoder
from tests.core.parity import load, random_text
from tests.core.policies import StandsStill

SOURCE = random.Random(5)
DOCUMENTS = [random_text(length, SOURCE, WORDS) for length in (4, 30, 1, 0, 60, 7, 7, 25, 200, 12)]


class Breaks:
    """A policy that breaks its contract after the second layer."""

    def route(self, layer: int, scores: np.ndarray, top_k: int) -> list[Route]:
        return [Route.DEFERRED] * (len(scores) - (layer == 2))


def random_requests(count: int, source: random.Random) -> list[Request]:
    return [
        Request(
            random_text(source.randint(1, 9), source, WORDS),
            source.sample(DOCUMENTS, source.randint(0, len(DOCUMENTS))),
            source.randint(1, 6),
            scores=source.choice(["exact", "estimated"]),
            pruning=source.choice([None, Off(), DropHalf(), ClusterPolicy(0.1)]),
        )
        for _ in range(count)
    ]


def assert_same(found: Sequence[RerankResult], expected: Sequence[RerankResult]) -> None:
    """The same rankings and the same traces, but for what depends on time; scores may differ by rounding."""
    for one, other in zip(found, expected, strict=True):
        assert [(r.index, r.text, r.estimated) for r in one.ranking] == [
            (r.index, r.text, r.estimated) for r in other.ranking
        ]
        assert [r.score for r in one.ranking] == pytest.approx([r.score for r in other.ranking], abs=1e-5)
        assert (one.trace.lengths, one.trace.truncated, one.trace.windows, one.trace.shared_prefix) == (
            other.trace.lengths, other.trace.truncated, other.trace.windows, other.trace.shared_prefix
        )  # fmt: skip
        assert [(layer.layer, layer.alive, layer.routes, layer.tokens) for layer in one.trace.layers] == [
            (layer.layer, layer.alive, layer.routes, layer.tokens) for layer in other.trace.layers
        ]


# Checks


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"query": " "}, "query=' '"),
        ({"query": None}, "query=None"),
        ({"documents": "one string"}, "documents must be a list"),
        ({"documents": ["a", 3]}, r"documents\[1\] is a int"),
        ({"top_k": 0}, "top_k=0"),
        ({"scores": "rough"}, "scores='rough'"),
        ({"pruning": "hard"}, "pruning='hard'"),
        ({"pruning": ClusterPolicy}, "pruning=<class"),
        ({"target": 1.0}, "target=1.0"),
        ({"target": "high"}, "target='high'"),
        ({"target": 0.9, "pruning": Off()}, r"target=0.9 and pruning=Off\(\)"),
        ({"query": "w1 " * 200}, "query has 200 tokens"),
    ],
)
def test_a_bad_request_is_refused_by_its_index_before_any_is_computed(
    tiny_bert: Path, fields: dict[str, object], told: str
) -> None:
    policy = StandsStill()
    good = Request("w1", ["w2", "w3"], 1, pruning=policy)
    bad = Request(**{"query": "w1", "documents": ["w2"], **fields})
    with load(tiny_bert) as reranker, pytest.raises(ValueError, match=rf"requests\[1\]: .*{told}"):
        reranker.rerank_many([good, bad])
    assert not policy.layers


@pytest.mark.parametrize(
    ("requests", "told"),
    [
        (Request("w1", ["w2"]), "requests must be a list of Request, not a Request"),
        ([Request("w1", ["w2"]), ("w1", ["w2"])], r"requests\[1\] is a tuple, not a Request"),
        ({"a": Request("w1", ["w2"])}, r"list\(requests\.values\(\)\)"),
    ],
)
def test_anything_but_requests_is_refused(tiny_bert: Path, requests: object, told: str) -> None:
    with load(tiny_bert) as reranker, pytest.raises(ValueError, match=told):
        reranker.rerank_many(requests)


def test_no_requests_and_no_documents(tiny_bert: Path) -> None:
    with load(tiny_bert) as reranker:
        assert reranker.rerank_many([]) == []
        nothing, something = reranker.rerank_many(Request("w1", texts) for texts in ([], np.array(["w2", "w3"])))
        assert nothing.ranking == []
        assert len(something.ranking) == 2
    with pytest.raises(RuntimeError, match="closed"):
        reranker.rerank_many([])


# Results


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), plan=st.sampled_from([None, *PLANS]))
def test_each_result_is_the_one_that_the_request_would_have_alone(
    tiny_bert: Path, spill_directory: Path, seed: int, plan: str | None
) -> None:
    requests = random_requests(5, random.Random(seed))
    with load(tiny_bert) if plan is None else load_planned(tiny_bert, **PLANS[plan]) as reranker:
        alone = [reranker.rerank_many([request])[0] for request in requests]
        assert_same(reranker.rerank_many(requests), alone)


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_requests_of_a_decoder_share_no_prefix_with_each_other(family: str, tmp_path: Path) -> None:
    directory = save_decoder(tmp_path, family)
    requests = random_requests(6, random.Random(3))
    with load_planned(directory, template=PROMPT, resident=()) as reranker:
        assert_same(reranker.rerank_many(requests), [reranker.rerank_many([request])[0] for request in requests])


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_prefixes_of_one_length_in_one_slice_stay_apart(family: str, tmp_path: Path) -> None:
    directory = save_decoder(tmp_path, family)
    requests = [Request(f"w{number} w{number + 1}", DOCUMENTS[:5]) for number in range(5)]
    with load(directory, template=PROMPT, slice_tokens=2000) as reranker:
        assert_same(reranker.rerank_many(requests), [reranker.rerank_many([request])[0] for request in requests])


def test_what_a_pass_reads_is_in_the_trace_of_each_of_its_requests() -> None:
    """Only the first is read by the lens before the first layer."""
    requests = [Request("w1", ["w2", "w3"], 1), Request("w1", ["w2", "w3"], 2)]
    with load(BUNDLED, memory_budget="105MB", pruning="auto") as reranker:
        traces = [result.trace for result in reranker.rerank_many(requests)]
    assert [trace.layers[0].layer for trace in traces] == [0, 1]
    assert {trace.embedding_hit_rate for trace in traces} == {0.0}
    assert len({trace.bytes_read for trace in traces}) == 1
    for trace in traces:
        assert trace.bytes_read == sum(layer.bytes_read for layer in trace.layers) > 0


def test_requests_with_a_lens_of_the_real_model(bundled: Reranker) -> None:
    topics = ["Berlin has 3.7 million inhabitants.", "Museums of Berlin.", "Bread needs yeast.", "Cats sleep.",
              "The population of Paris.", "Rivers of Germany.", "Chess openings.", "Rain in Spain."]  # fmt: skip
    texts = topics * 3
    queries = ["How many people live in Berlin?", "Which openings are sharp?", "What do cats do?"]
    requests = [
        Request(query, texts[: 24 - 3 * number], 2 + number, scores=scores, pruning=policy)
        for number, query in enumerate(queries)
        for scores in ("exact", "estimated")
        for policy in (None, Off())
    ]
    with load(bundled.model_path, pruning="auto") as reranker:
        assert_same(reranker.rerank_many(requests), [reranker.rerank_many([request])[0] for request in requests])
        one = reranker.rerank(queries[0], texts, 2)
        assert_same([one], reranker.rerank_many([Request(queries[0], texts, 2)]))
        assert 0 < one.trace.compute_share < 1


@pytest.mark.skipif(kernels().level is None, reason="only compiled kernels give the same bits beside others")
def test_passes_side_by_side_give_every_bit_that_each_request_has_alone(bundled: Reranker) -> None:
    source = random.Random(3)
    words = ["sea", "blue", "sky", "salt", "a", "of"]
    texts = [random_text(source.randint(1, 90), source, words) for _ in range(40)]
    requests = [
        Request(f"why is the {word} blue?", source.sample(texts, source.randint(1, 40)), 4, scores=scores)
        for word in ("sea", "sky", "salt")
        for scores in ("exact", "estimated")
    ]
    with load(bundled.model_path, pruning="auto") as reranker, ThreadPoolExecutor(6) as pool:
        with torch_threads(1):
            alone = [reranker.rerank_many([request])[0] for request in requests]
        with torch_threads(2):  # one for each lane, because the head is made of torch's products
            together = reranker.rerank_many(requests)
            in_threads = list(pool.map(lambda request: reranker.rerank_many([request] * 2)[0], requests))
    for found in (together, in_threads):
        assert_same(found, alone)
        for one, other in zip(found, alone, strict=True):
            assert one.ranking == other.ranking
            assert [layer.scores for layer in one.trace.layers] == [layer.scores for layer in other.trace.layers]
            assert (one.trace.bytes_read, one.trace.seconds_waited) == (0, 0)


def test_threads_and_tasks_that_share_passes_get_the_results_that_they_would_have_alone(
    tiny_bert: Path, spill_directory: Path
) -> None:
    requests = [request for request in random_requests(40, random.Random(8)) if request.pruning is None]
    everything = {"resident": (), "hidden_tokens": 0, "embedding_rows": 7}
    with load_planned(tiny_bert, **everything, pruning=DropHalf()) as reranker, ThreadPoolExecutor(6) as pool:

        def ask(request: Request) -> RerankResult:
            return reranker.rerank(request.query, request.documents, request.top_k, scores=request.scores)

        async def ask_all() -> list[RerankResult]:
            return await asyncio.gather(
                *(reranker.arerank(r.query, r.documents, r.top_k, scores=r.scores) for r in requests)
            )

        alone = [ask(request) for request in requests]
        pairs = [(request.query, text) for request in requests for text in request.documents]
        scores = reranker.score(pairs)
        in_tasks, in_threads = pool.submit(asyncio.run, ask_all()), list(pool.map(ask, requests))
        assert_same(in_threads, alone)
        assert_same(in_tasks.result(), alone)
        beside = pool.submit(reranker.rerank_many, requests)
        assert reranker.score(pairs) == pytest.approx(scores, abs=1e-5)
        assert_same(beside.result(), alone)


# Errors and cancellation


async def test_a_policy_that_breaks_its_contract_fails_its_own_request(tiny_bert: Path) -> None:
    policy = StandsStill()
    with load(tiny_bert, pruning=policy) as reranker, load(tiny_bert, pruning=ClusterPolicy(0.1)) as alone:
        expected = alone.rerank("w1", DOCUMENTS, 3)
        first = asyncio.create_task(reranker.arerank("w9", DOCUMENTS, 1))
        while not policy.reached.is_set():
            await asyncio.sleep(0.001)
        reranker.pruning = Breaks()
        bad = asyncio.create_task(reranker.arerank("w1", DOCUMENTS, 3))
        await asyncio.sleep(0)
        reranker.pruning = ClusterPolicy(0.1)
        good = asyncio.create_task(reranker.arerank("w1", DOCUMENTS, 3))
        await asyncio.sleep(0)
        policy.go.set()
        assert len((await first).ranking) == 1
        with pytest.raises(ValueError, match="after layer 2"):
            await bad
        assert_same([await good], [expected])


@pytest.mark.parametrize("called", ["rerank", "score", "rerank_many", "close"])
def test_a_policy_that_calls_its_own_reranker_is_told_so(tiny_bert: Path, called: str) -> None:
    class Asks(Off):
        def route(self, layer: int, scores: np.ndarray, top_k: int) -> Sequence[Route]:
            arguments = {
                "rerank": ("w1", ["w2"]),
                "score": ([("w1", "w2")],),
                "rerank_many": ([Request("w1", ["w2"])],),
                "close": (),
            }
            getattr(reranker, called)(*arguments[called])
            return super().route(layer, scores, top_k)

    with load(tiny_bert, pruning=Asks()) as reranker:
        with pytest.raises(RuntimeError, match="a pruning policy called the reranker"):
            reranker.rerank("w1", DOCUMENTS, 2)
        assert len(reranker.rerank("w1", DOCUMENTS, 99).ranking) == len(DOCUMENTS)


async def test_a_score_that_is_no_number_fails_its_own_request(tmp_path: Path) -> None:
    directory = save_model(tmp_path, "bert")
    path = directory / "model.safetensors"
    weights = load_file(path)
    weights["bert.embeddings.word_embeddings.weight"][4 + WORDS.index("w150")] = float("nan")
    save_file(weights, path, {"format": "pt"})
    queries = ["w1", "w2", "w3 w150", "w4"]
    with load(directory) as reranker:
        expected = [reranker.rerank(query, DOCUMENTS[:4]) for query in queries if "w150" not in query]
        answers = await asyncio.gather(
            *(reranker.arerank(query, DOCUMENTS[:4]) for query in queries), return_exceptions=True
        )
        assert isinstance(answers.pop(2), ScoreError)
        assert_same(answers, expected)
        with pytest.raises(ScoreError, match="document 1 "):
            reranker.rerank_many([Request("w1", ["w2"]), Request("w1", ["w2", "w150"]), Request("w1", ["w3"])])
        assert_same(
            reranker.rerank_many([Request(q, DOCUMENTS[:4]) for q in queries if "w150" not in q]), expected
        )


async def test_a_job_tells_its_tokens_before_it_is_computed(tiny_bert: Path) -> None:
    request = Request("w1", DOCUMENTS, 3)
    with load(tiny_bert) as reranker:
        jobs = [reranker.job(request) for _ in range(3)]
        counted = [job.tokens for job in jobs]
        found = await asyncio.gather(*(reranker.awaited(request, job) for job in jobs))
        assert counted == [sum(result.trace.lengths) for result in found]
        assert_same(found, [reranker.rerank("w1", DOCUMENTS, 3)] * 3)


async def test_a_cancelled_task_stops_computing_and_the_others_of_its_pass_go_on(tiny_bert: Path) -> None:
    first, second, third = StandsStill(), StandsStill(), StandsStill()
    third.go.set()
    with load(tiny_bert) as reranker:
        expected = reranker.rerank("w1", DOCUMENTS[:4], 2)
        tasks = []
        for policy in (first, second, third):
            reranker.pruning = policy
            tasks.append(asyncio.create_task(reranker.arerank("w1", DOCUMENTS[:4], 2)))
            await asyncio.sleep(0)
        while not first.reached.is_set():
            await asyncio.sleep(0.001)
        first.go.set()
        while not second.reached.is_set():
            await asyncio.sleep(0.001)
        tasks[1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[1]
        second.go.set()
        assert_same([await tasks[0], await tasks[2]], [expected] * 2)
    assert second.layers == [1]
    assert first.layers == third.layers == [1, 2, 3, 4]


class Interrupted(Off):
    """Somebody presses Ctrl-C while requests of the main thread are computed and others come."""

    def __init__(self) -> None:
        self.computing = threading.Event()

    def route(self, layer: int, scores: np.ndarray, top_k: int) -> Sequence[Route]:
        if not self.computing.is_set():
            self.computing.set()
            sleep(0.05)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return super().route(layer, scores, top_k)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="this system sends no signals to threads")
@pytest.mark.parametrize("count", [1, 3])
def test_ctrl_c_in_the_main_thread_leaves_the_others_their_results(tiny_bert: Path, count: int) -> None:
    policy = Interrupted()
    with load(tiny_bert, pruning=policy) as reranker, ThreadPoolExecutor(3) as pool:

        def come() -> RerankResult:
            assert policy.computing.wait(30)
            return reranker.rerank("w1", DOCUMENTS, 2)

        others = [pool.submit(come) for _ in range(3)]
        with pytest.raises(KeyboardInterrupt):
            reranker.rerank_many([Request("w1", DOCUMENTS, 2)] * count)
        assert_same(
            [other.result(30) for other in others],
            reranker.rerank_many([Request("w1", DOCUMENTS, 2, pruning=Off())] * 3),
        )


def test_requests_with_a_policy_of_their_own_are_not_recalibrated(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRATING_CACHE", str(tmp_path))
    monkeypatch.setattr(recalibration, "IDLE", 1000.0)
    with load(tiny_bert, pruning="cluster", recalibrate=1.0) as reranker:
        reranker.rerank_many([Request("w1", DOCUMENTS, 3, pruning=Off()), Request("w1", DOCUMENTS, 99)])
        reranker.rerank_many([Request("w1", DOCUMENTS, 3, target=0.5)])
        assert reranker.recalibration.waiting == 0
        reranker.rerank_many([Request("w1", DOCUMENTS, 3)] * 2)
        assert reranker.recalibration.waiting == 2
