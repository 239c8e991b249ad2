"""A tiny random language model with a chat template, for the adapters, and what their tests share of it."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from grating_core import StreamedCausalLM
from tests.core.conftest import DECODER, SIZES, WORDS, randomise

WINDOW = 4096
ROLES = {"system": "w190", "user": "w191", "assistant": "w192"}
"""The words that stand before what somebody says."""
GEMMAS = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ 'w191 ' if message['role'] == 'user' else 'w192 ' }}{{ message['content'] | trim }} {% endfor %}"
    "{% if add_generation_prompt %}w192 {% endif %}"
)
"""A template like Gemma's, which takes no system message, and turns only."""
_TEMPLATE = (
    "{% for message in messages %}"
    + "".join(f"{{% if message.role == '{role}' %}}{word} {{% endif %}}" for role, word in ROLES.items())
    + "{{ message.content }} {% endfor %}"
    + f"{{% if add_generation_prompt %}}{ROLES['assistant']} {{% endif %}}"
)


def save_chat_model(directory: Path, template: str = _TEMPLATE) -> Path:
    """It never ends a text by itself."""
    torch.manual_seed(0)
    sizes = {**SIZES, **DECODER, "max_position_embeddings": WINDOW}
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    model = randomise(LlamaForCausalLM(LlamaConfig(**sizes)))
    with torch.no_grad():
        model.lm_head.weight[specials.index("</s>")] = 0  # another token is always likelier
    model.save_pretrained(directory)
    vocabulary = {token: number for number, token in enumerate([*specials, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=WINDOW,
        chat_template=template,
    ).save_pretrained(directory)  # fmt: skip
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def core(directory: Path) -> Iterator[StreamedCausalLM]:
    """The model below an adapter, asked directly."""
    with StreamedCausalLM.from_pretrained(directory) as model:
        yield model


async def check_cancelled(ask: Callable[..., Awaitable[object]]) -> None:
    """What is cancelled stops computing: else the next request, which waits for it, would come much too late."""
    task = asyncio.ensure_future(ask("w1", max_tokens=4000))
    await asyncio.sleep(0.2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(ask("w1", max_tokens=2), 3)
