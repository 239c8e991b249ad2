"""A language model that several use: loaded once and let go, asked by several tasks."""

import asyncio
import gc
import threading
import weakref
from pathlib import Path

import pytest

from grating_core import StreamedCausalLM
from tests.tiny_chat import save_chat_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat"))


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
        tasks = [asyncio.create_task(model.agenerate("w1", max_new_tokens=4000)) for _ in range(3)]
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
