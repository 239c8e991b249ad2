"""How long loaded models live: shared, closed, copied, forked, beside other threads and on an event loop."""

import asyncio
import copy
import gc
import multiprocessing
import os
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic, sleep
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from grating_core import BudgetError, ModelNotFoundError, Reranker, StreamedCausalLM
from grating_core.columns import reading
from grating_core.columns.disk import Disk
from grating_core.errors import FileError
from grating_core.forking import Lock, Threads, computed, run_in_thread
from grating_core.lens import recalibrate as recalibration
from grating_core.memory import positioned
from grating_core.memory.checkpoint import Checkpoint
from grating_core.models import stored_causal_lm
from grating_core.opening.layered import open_layered
from grating_core.pruning import ClusterPolicy
from tests.core.conftest import save_model
from tests.core.forking import in_fork
from tests.core.memory.conftest import PLANS, load_planned, load_planned_lm
from tests.core.models.test_decoders import save_decoder
from tests.core.parity import load
from tests.core.policies import StandsStill
from tests.tiny_chat import save_chat_model

QUERY = "w1 w2"
DOCUMENTS = [" ".join(f"w{(7 * n + m) % 200}" for m in range(10 + n)) for n in range(12)]
EVERYTHING_ON_DISK = PLANS["all at once"]

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("decoder"), "llama")


class SlowDisk:
    """Reads by the threads of one name wait to be let go, but not in another process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.process, self.name = os.getpid(), name
        self.reached, self.go = threading.Event(), threading.Event()
        self.read = positioned.read_at
        monkeypatch.setattr(positioned, "read_at", self)
        # No columns are read ahead, so that who waits for them reads them here.
        monkeypatch.setattr(reading, "begin_reading", lambda file, pieces: SimpleNamespace(wait=lambda: 0))

    def __call__(self, *what: object) -> int:
        if os.getpid() == self.process and threading.current_thread().name.startswith(self.name):
            self.reached.set()
            assert self.go.wait(30)
        return self.read(*what)


# Sharing


def test_it_is_loaded_once_and_let_go(directory: Path) -> None:
    found: list[StreamedCausalLM] = []
    threads = [
        threading.Thread(target=lambda: found.append(StreamedCausalLM.shared(directory, dtype="float32")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(model) for model in found}) == 1
    assert StreamedCausalLM.shared(directory, dtype="bfloat16") is not found[0]
    found[0].close()
    again = StreamedCausalLM.shared(directory, dtype="float32")
    assert again is not found[0]
    assert not again.closed
    held = weakref.ref(again)
    del again, threads
    gc.collect()
    assert held() is None


async def test_agenerate_leaves_the_event_loop_free(directory: Path) -> None:
    with StreamedCausalLM.from_pretrained(directory) as model:
        prompts = [f"w{n} w{n + 1}" for n in range(10)]  # more than the event loop has worker threads
        answering = asyncio.gather(*(model.agenerate(prompt, max_new_tokens=20) for prompt in prompts))
        turns = 0
        while not answering.done():
            turns += 1
            await asyncio.sleep(0.001)
        assert turns > 10
        assert [one.text for one in await answering] == [
            model.generate(p, max_new_tokens=20).text for p in prompts
        ]
        with pytest.raises(ValueError, match="temperature"):
            await model.agenerate("w1", temperature=-1)


async def test_a_cancelled_task_stops_computing(directory: Path) -> None:
    """Else the next request, which has to wait for it, would come much too late."""
    with StreamedCausalLM.from_pretrained(directory) as model:
        tasks = [asyncio.create_task(model.agenerate("w2", max_new_tokens=4000)) for _ in range(3)]
        await asyncio.sleep(0.2)
        for task in tasks:
            task.cancel()
        assert all(
            isinstance(e, asyncio.CancelledError) for e in await asyncio.gather(*tasks, return_exceptions=True)
        )
        await asyncio.wait_for(model.agenerate("w1", max_new_tokens=2), 3)


def test_tokens_are_counted_without_special_ones(directory: Path) -> None:
    with StreamedCausalLM.from_pretrained(directory) as model:
        assert model.count_tokens("w1 w2 w3") == 3


# Forks


@forks
@pytest.mark.parametrize("plan", ["streamed", "spilled", "one row", "all at once"])
def test_a_planned_reranker_works_in_a_forked_child(plan: str, tiny_bert: Path, spill_directory: Path) -> None:
    with load_planned(tiny_bert, **PLANS[plan]) as planned:
        expected = planned.rerank(QUERY, DOCUMENTS).ranking

        def rerank_twice() -> list:
            return [planned.rerank(QUERY, DOCUMENTS).ranking for _ in range(2)]

        assert in_fork(rerank_twice) == [expected] * 2
        assert in_fork(lambda: in_fork(rerank_twice)) == [expected] * 2
        assert planned.rerank(QUERY, DOCUMENTS).ranking == expected


@forks
def test_a_fork_in_the_midst_of_another_threads_request(tiny_bert: Path, spill_directory: Path) -> None:
    policy = StandsStill()
    expected = load(tiny_bert).rerank(QUERY, DOCUMENTS).ranking
    with load_planned(tiny_bert, **EVERYTHING_ON_DISK, pruning=policy) as planned, ThreadPoolExecutor(1) as other:
        under_way = other.submit(planned.rerank, QUERY, DOCUMENTS)
        assert policy.reached.wait(30)
        found = in_fork(lambda: planned.rerank(QUERY, DOCUMENTS).ranking)
        policy.go.set()
        assert under_way.result().ranking == found
    assert [(r.index, r.score) for r in found] == [(r.index, pytest.approx(r.score, abs=1e-5)) for r in expected]


@forks
def test_callers_share_passes_in_a_forked_child(tiny_bert: Path) -> None:
    policy = StandsStill()
    with load_planned(tiny_bert, resident=(), pruning=policy) as planned, ThreadPoolExecutor(4) as others:

        async def together() -> list:
            return await asyncio.gather(*(planned.arerank(QUERY, DOCUMENTS) for _ in range(5)))

        def work() -> list:
            with ThreadPoolExecutor(4) as threads:
                found = [
                    *threads.map(lambda _: planned.rerank(QUERY, DOCUMENTS), range(8)),
                    *asyncio.run(together()),
                ]
            return [result.ranking for result in found]

        under_way = [others.submit(planned.rerank, QUERY, DOCUMENTS) for _ in range(4)]
        assert policy.reached.wait(30)
        found = in_fork(work)
        policy.go.set()
        for call in under_way:
            assert [(r.index, r.score) for r in call.result().ranking] == [
                (r.index, pytest.approx(r.score, abs=1e-5)) for r in found[0]
            ]
    assert len(found) == 13
    for one in found:
        assert [(r.index, r.score) for r in one] == [(r.index, pytest.approx(r.score, abs=1e-5)) for r in found[0]]


@forks
def test_a_fork_while_a_layer_is_being_read(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load_planned(tiny_bert, resident=()) as planned:
        expected = planned.rerank(QUERY, DOCUMENTS).ranking
        disk = SlowDisk(monkeypatch, "grating-weights")
        with ThreadPoolExecutor(1) as other:
            under_way = other.submit(planned.rerank, QUERY, DOCUMENTS)
            assert disk.reached.wait(30)
            assert in_fork(lambda: planned.rerank(QUERY, DOCUMENTS).ranking) == expected
            disk.go.set()
            assert under_way.result().ranking == expected


@pytest.fixture
def new_pruned(decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], StreamedCausalLM]:
    """Loads a language model whose columns are nearly all read from disk, and chosen whatever is in memory."""
    monkeypatch.setenv("GRATING_CACHE", str(tmp_path))
    monkeypatch.setattr(stored_causal_lm, "sampling_bytes", lambda *_: 0)  # more than all of this model
    monkeypatch.setattr(reading, "Disk", lambda: Disk(0, 0))

    settings = {"device": "cpu", "dtype": "float32", "mlp_density": 0.5, "max_length": 64}
    settings |= {"inputs_preference": 1, "products_preference": 1}
    with pytest.raises(BudgetError) as told:
        StreamedCausalLM.from_pretrained(decoder, memory_budget=1000, **settings)
    return lambda: StreamedCausalLM.from_pretrained(decoder, memory_budget=told.value.smallest, **settings)


def text(model: StreamedCausalLM) -> str:
    return model.generate(QUERY, max_new_tokens=20).text


@forks
def test_pruned_mlps_read_their_columns_again_in_a_forked_child(
    new_pruned: Callable[[], StreamedCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child must not take for present what was on its way to another thread."""
    with new_pruned() as fresh:
        expected = text(fresh)
    with new_pruned() as model:
        assert in_fork(lambda: text(model)) == expected
        disk = SlowDisk(monkeypatch, "ThreadPoolExecutor")
        with ThreadPoolExecutor(1) as other:
            under_way = other.submit(text, model)
            assert disk.reached.wait(30)
            assert in_fork(lambda: text(model)) == expected
            disk.go.set()
            assert under_way.result() == expected


@forks
def test_a_language_model_works_in_a_forked_child(decoder: Path) -> None:
    with load_planned_lm(decoder, resident=(), embedding_rows=7) as model:
        expected = model.generate("w1 w2 w3", max_new_tokens=8).text
        stream = model.stream("w1 w2 w3", max_new_tokens=8)
        first = next(stream)
        assert in_fork(lambda: model.generate("w1 w2 w3", max_new_tokens=8).text) == expected
        assert in_fork(lambda: first + "".join(stream)) == expected
        assert first + "".join(stream) == expected
        assert in_fork(lambda: asyncio.run(model.agenerate("w1 w2 w3", max_new_tokens=8)).text) == expected


@forks
def test_a_fork_while_another_thread_loads_what_is_shared(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, reached, go = os.getpid(), threading.Event(), threading.Event()
    find = open_layered.__globals__["find_prompt"]

    def slow(*what: object) -> object:
        if os.getpid() == process:
            reached.set()
            assert go.wait(30)
        return find(*what)

    monkeypatch.setattr("grating_core.opening.layered.find_prompt", slow)
    settings = {"device": "cpu", "dtype": "float32", "pruning": "off"}
    with ThreadPoolExecutor(1) as other:
        loading = other.submit(Reranker.shared, tiny_bert, **settings)
        assert reached.wait(30)
        found = in_fork(lambda: Reranker.shared(tiny_bert, **settings).rerank(QUERY, DOCUMENTS).ranking)
        go.set()
        assert loading.result().rerank(QUERY, DOCUMENTS).ranking == found


@forks
def test_a_forked_child_recalibrates_by_itself(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRATING_CACHE", str(tmp_path))
    monkeypatch.setattr(recalibration, "IDLE", 0.0)
    with load(tiny_bert, pruning="cluster", recalibrate=1.0) as reranker:

        def learn() -> int:
            before = reranker.recalibration.requests
            reranker.rerank(QUERY, DOCUMENTS, 3)
            while reranker.recalibration.requests == before:
                threading.Event().wait(0.002)
            return reranker.recalibration.requests

        learn()
        held, go = threading.Event(), threading.Event()

        def call() -> None:
            with reranker.recalibration.caller(), reranker.recalibration.changed:
                held.set()
                assert go.wait(30)

        with ThreadPoolExecutor(1) as other:
            other.submit(call)
            assert held.wait(30)
            assert in_fork(learn) == reranker.recalibration.requests + 1
            go.set()


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.ones(2000, 2000).exp()  # the team of two is there
    yield
    torch.set_num_threads(before)


@forks
@pytest.mark.usefixtures("two_threads")
def test_a_resident_model_works_in_a_child_of_a_process_with_openmp(bundled: Reranker) -> None:
    documents = [" ".join(["Berlin has many museums", *["and parks"] * n]) for n in range(20)]
    expected = bundled.rerank("museums", documents).ranking

    def work() -> list:
        loaded = load(bundled.model_path)
        return [reranker.rerank("museums", documents).ranking for reranker in (bundled, loaded)]

    assert in_fork(work) == [expected] * 2


@forks
@pytest.mark.usefixtures("two_threads")
def test_what_a_child_computes_is_not_computed_by_the_thread_that_came_through_the_fork() -> None:
    def thread() -> int:
        return threading.get_ident()

    assert computed(thread) == thread()
    here, there, sizes = in_fork(
        lambda: (thread(), computed(thread), computed(lambda: len(torch.ones(2000, 2000).exp())))
    )
    assert here != there
    assert sizes == 2000


@forks
def test_a_lock_is_free_in_a_forked_child() -> None:
    lock = Lock()

    def take_twice() -> bool:
        with lock:
            pass
        return True

    def let_go() -> bool:
        lock.__exit__()
        return take_twice()

    with lock:
        assert in_fork(let_go)  # by the thread that held it
        with ThreadPoolExecutor(1) as other:
            assert other.submit(in_fork, take_twice).result()  # by another


# Other threads


def test_other_threads_make_modules_while_a_model_loads(tiny_bert: Path, decoder: Path) -> None:
    done, seen = threading.Event(), set()
    usual = nn.Module.register_parameter, nn.init.kaiming_uniform_, torch.get_default_dtype()

    def make_modules() -> int:
        number = 0
        while not done.is_set():
            layer = nn.Linear(3, 3)
            number += 1
            assert not layer.weight.is_meta
            assert layer.weight.abs().sum() > 0
            seen.add((nn.Module.register_parameter, nn.init.kaiming_uniform_, torch.get_default_dtype()))
        return number

    with ThreadPoolExecutor(1) as other:
        making = other.submit(make_modules)
        try:
            for _ in range(5):
                load(tiny_bert, dtype="bfloat16").close()
                StreamedCausalLM.from_pretrained(decoder, dtype="bfloat16").close()
        finally:
            done.set()
        assert making.result() > 100
    assert seen == {usual}


@pytest.mark.parametrize("failing", range(4))
def test_a_thread_that_cannot_be_had_costs_one_call(
    failing: int, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load_planned(tiny_bert, resident=()) as planned:
        expected = load(tiny_bert).score([(QUERY, text) for text in DOCUMENTS])
        submit, calls = Threads.submit, []

        def submit_or_not(threads: Threads, call: Callable[..., object], *what: object) -> object:
            if call.__module__ == "grating_core.memory.streamer":
                calls.append(what)
                if len(calls) == failing + 1:
                    raise RuntimeError("can't start new thread")
            return submit(threads, call, *what)

        monkeypatch.setattr(Threads, "submit", submit_or_not)
        failed = 0
        for _ in range(4):
            try:
                found = planned.score([(QUERY, text) for text in DOCUMENTS])
            except RuntimeError:
                failed += 1
            else:
                assert found == pytest.approx(expected, abs=1e-5)
        assert len(calls) > failing
        assert failed == (failing == 0)  # reading ahead costs nothing


def test_a_pool_without_a_thread_makes_no_call_and_then_does(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, made = Threads(2, "grating-test"), []
    with monkeypatch.context() as broken:

        def fail(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        broken.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            pool.submit(made.append, 1)
    pool.submit(made.append, 2).result(30)
    assert made == [2]
    pool.close()
    with pytest.raises(RuntimeError, match="ended"):
        pool.submit(made.append, 3)


# Event loops


async def test_calls_that_wait_for_their_turn_hold_up_nobody_else(tiny_bert: Path) -> None:
    policy, others = StandsStill(), set(threading.enumerate())
    with load_planned(tiny_bert, resident=(), pruning=policy) as planned:
        calls = [asyncio.create_task(planned.arerank(QUERY, DOCUMENTS, 1)) for _ in range(40)]
        while not policy.reached.is_set():
            await asyncio.sleep(0.001)
        assert await asyncio.wait_for(asyncio.to_thread(int, "3"), 30) == 3
        assert await asyncio.wait_for(run_in_thread(int, "3"), 30) == 3
        names = [thread.name for thread in set(threading.enumerate()) - others]
        assert sum(name.startswith("grating-rerank") for name in names) == 1
        for call in calls[1:30]:
            call.cancel()
        await asyncio.wait(calls[1:30])
        policy.go.set()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert [isinstance(answer, asyncio.CancelledError) for answer in answers[1:30]] == [True] * 29
        assert len({answer.ranking[0] for answer in [answers[0], *answers[30:]]}) == 1
        assert policy.layers.count(1) == 11  # what was cancelled before its turn was never computed


async def test_closing_lets_those_who_wait_finish_and_refuses_what_comes(tiny_bert: Path) -> None:
    policy = StandsStill()
    planned = load_planned(tiny_bert, resident=(), pruning=policy)
    calls = [asyncio.create_task(planned.arerank(QUERY, DOCUMENTS, 1)) for _ in range(3)]
    while not policy.reached.is_set():
        await asyncio.sleep(0.001)
    closing = asyncio.create_task(asyncio.to_thread(planned.close))
    await asyncio.sleep(0.02)
    with pytest.raises(RuntimeError, match="closed"):
        await planned.arerank(QUERY, DOCUMENTS)
    policy.go.set()
    await closing
    assert planned.closed
    assert len({answer.ranking[0] for answer in await asyncio.gather(*calls)}) == 1
    with pytest.raises(RuntimeError, match="closed"):
        planned.rerank(QUERY, DOCUMENTS)
    with pytest.raises(RuntimeError, match="closed"):
        await planned.arerank(QUERY, DOCUMENTS)


# Copies


@pytest.mark.parametrize(
    "settings", [{}, {"memory_budget": "100MB"}, {"recalibrate": 0.5, "pruning": ClusterPolicy(8.0)}], ids=str
)
@pytest.mark.parametrize("again", [lambda it: pickle.loads(pickle.dumps(it)), copy.deepcopy, copy.copy])
def test_a_reranker_is_copied_by_loading_it_again(
    again: Callable[[Reranker], Reranker], settings: dict, tiny_bert: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("GRATING_CACHE", str(tmp_path))
    monkeypatch.chdir(tiny_bert.parent)
    with load(Path(tiny_bert.name), **settings) as reranker:
        monkeypatch.chdir(tmp_path)
        expected = reranker.rerank(QUERY, DOCUMENTS).ranking
        with again(reranker) as twin:
            assert twin is not reranker
            assert twin.rerank(QUERY, DOCUMENTS).ranking == expected
            assert (twin.plan is None) == (reranker.plan is None)
            assert (twin.recalibration is None) == (reranker.recalibration is None)
        assert not reranker.closed
        with again(again(reranker)) as twin:
            assert twin.rerank(QUERY, DOCUMENTS).ranking == expected
    with pytest.raises(RuntimeError, match="closed"):
        again(reranker)


def test_a_language_model_is_copied_by_loading_it_again(directory: Path) -> None:
    with (
        StreamedCausalLM.from_pretrained(directory, memory_budget="100MB") as model,
        pickle.loads(pickle.dumps(model)) as twin,
    ):
        assert twin.plan is not None
        assert twin.generate("w1 w2", max_new_tokens=5).text == model.generate("w1 w2", max_new_tokens=5).text


def test_what_is_shared_is_shared_in_the_other_process_too(tiny_bert: Path) -> None:
    held = Reranker.shared(tiny_bert, dtype="float32")
    pickled = pickle.dumps([held, held])
    assert pickle.loads(pickled) == [held, held]
    assert copy.deepcopy(held) is held
    held = None
    gc.collect()
    one, other = pickle.loads(pickle.dumps(pickle.loads(pickled)))
    assert one is other is Reranker.shared(tiny_bert, dtype="float32")


@pytest.mark.parametrize("opens", [Reranker.open, Reranker.open_shared, StreamedCausalLM.open])
@pytest.mark.parametrize("settings", ["owner/name", {"model": "owner/name", "token": "hf_secret"}, None])
def test_what_opens_takes_settings(opens: Callable[[object], object], settings: object) -> None:
    with pytest.raises(ValueError, match=r"^settings must be an object such as .*from_pretrained") as refusal:
        opens(settings)
    assert "hf_secret" not in str(refusal.value)


def test_a_token_is_never_written(tiny_bert: Path) -> None:
    with load(tiny_bert, token="hf_secret") as reranker:
        assert b"hf_secret" not in pickle.dumps(reranker)


def test_what_was_put_together_from_parts_cannot_be_copied(tiny_bert: Path, decoder: Path) -> None:
    for model in (load_planned(tiny_bert), load_planned_lm(decoder)):
        with model, pytest.raises(TypeError, match=r"cannot be pickled or copied.*from_pretrained"):
            pickle.dumps(model)


@pytest.mark.slow
def test_a_spawned_process_gets_a_reranker(tiny_bert: Path) -> None:
    with load(tiny_bert, memory_budget="100MB") as reranker:
        expected = reranker.rerank(QUERY, DOCUMENTS).ranking
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            assert pool.apply(Reranker.rerank, [reranker, QUERY, DOCUMENTS]).ranking == expected


# Closing


def open_files() -> list[str]:
    return sorted(str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink())


weights = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files cannot be counted here")


@weights
@pytest.mark.parametrize("plan", PLANS)
def test_closing_closes_the_weights(plan: str, tiny_bert: Path, spill_directory: Path) -> None:
    with load_planned(tiny_bert, **PLANS[plan]) as planned:
        planned.rerank(QUERY, DOCUMENTS)
    assert not [name for name in open_files() if name.startswith(str(tiny_bert))]


@weights
def test_a_model_that_nobody_holds_closes_its_files_without_a_warning(
    tiny_bert: Path, recwarn: pytest.WarningsRecorder
) -> None:
    load_planned(tiny_bert, resident=(), embedding_rows=7).rerank(QUERY, DOCUMENTS)
    until = monotonic() + 10  # the thread that reads ahead holds the model until its read is over
    while (held := [name for name in open_files() if name.startswith(str(tiny_bert))]) and monotonic() < until:
        sleep(0.02)
        gc.collect()
    assert not held
    assert not [str(one.message) for one in recwarn if one.category is ResourceWarning]


@weights
def test_a_load_that_fails_leaves_no_file_open(tmp_path: Path, decoder: Path) -> None:
    directory = save_model(tmp_path / "model", "bert")
    failing: list[Callable[[], object]] = [
        lambda: load(directory, memory_budget=1000),
        lambda: load(directory, template="nonsense"),
        lambda: load(directory, max_length=1),
        lambda: load(directory, lens=tmp_path),
        lambda: load(decoder, mlp_density=0.5, memory_budget=1000),
        lambda: StreamedCausalLM.from_pretrained(decoder, memory_budget=1000),
        lambda: StreamedCausalLM.from_pretrained(directory),
    ]
    errors = []
    for fail in failing:
        with pytest.raises((ValueError, Exception)) as told:
            fail()
        errors.append(told)  # with them what their frames hold
    weights = directory / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data.replace(b"classifier", b"klassifier"))
    with pytest.raises(ModelNotFoundError) as told:
        load(directory)
    errors.append(told)
    weights.write_bytes(data[:1000])
    with pytest.raises(ModelNotFoundError) as told:
        load(directory)
    errors.append(told)
    assert not [name for name in open_files() if name.endswith(".safetensors")]
    assert len(errors) == 9


@weights
def test_a_file_that_was_closed_stays_closed(tiny_bert: Path) -> None:
    path = tiny_bert / "model.safetensors"
    stored = Checkpoint([path], lasting=True)
    tensor = next(iter(stored.tensors.values()))
    buffer = torch.zeros(8, dtype=torch.uint8)
    stored.read(tensor, tensor.start, buffer)
    stored.close()
    stored.close()
    stored.announce(tensor, [(0, 8)])
    with pytest.raises(FileError, match="closed"):
        stored.read(tensor, tensor.start, buffer)
    assert str(path) not in open_files()


@weights
def test_a_file_that_is_opened_again_is_open_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save_model(tmp_path / "model", "bert")
    path = directory / "model.safetensors"
    with load_planned(directory, resident=(), embedding_rows=7) as planned:
        expected = planned.rerank(QUERY, DOCUMENTS).ranking
        before = open_files()
        for _ in range(3):
            data = path.read_bytes()
            path.unlink()
            path.write_bytes(data)
            fail_once(monkeypatch)
            assert planned.rerank(QUERY, DOCUMENTS).ranking == expected
        assert len(open_files()) == len(before)
    assert str(path) not in open_files()


def fail_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read, failed = positioned.read_at, []

    def fail(*what: object) -> int:
        if not failed:
            failed.append(True)
            raise OSError(5, "Input/output error")
        return read(*what)

    monkeypatch.setattr(positioned, "read_at", fail)


# Named pipes


def rerank_several(planned: Reranker, query: str) -> None:
    """More than one request: what was read ahead before the damage is whole."""
    for _ in range(2):
        planned.rerank(query, DOCUMENTS)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_named_pipe_where_weights_were_is_an_error(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model", "bert")
    path = directory / "model.safetensors"
    data = path.read_bytes()
    with load_planned(directory, resident=(), embedding_rows=7) as planned:
        expected = planned.rerank(QUERY, DOCUMENTS).ranking
        path.write_bytes(b"")  # the file that is open
        path.unlink()
        os.mkfifo(path)
        for query in ("w50 w60", "w70 w80"):
            with pytest.raises(FileError, match="not a regular file"):
                rerank_several(planned, query)
        with pytest.raises(ModelNotFoundError, match=r"model\.safetensors"):
            load(directory)
        path.unlink()
        path.write_bytes(data)
        assert planned.rerank(QUERY, DOCUMENTS).ranking == expected
