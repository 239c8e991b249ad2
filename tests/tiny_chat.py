"""A tiny random language model with a chat template, for the adapters."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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
    """It hardly ever ends a text by itself."""
    torch.manual_seed(0)
    sizes = {**SIZES, **DECODER, "max_position_embeddings": WINDOW}
    randomise(LlamaForCausalLM(LlamaConfig(**sizes))).save_pretrained(directory)
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = {token: number for number, token in enumerate([*specials, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=WINDOW,
        chat_template=template,
    ).save_pretrained(directory)  # fmt: skip
    return directory
