"""Generating: the same tokens as transformers, streaming, stop strings, seeds, bad input, faults."""

import json
import os
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from grating_core import BudgetError, ModelNotFoundError, StreamedCausalLM, UnsupportedModelError
from grating_core.errors import FileError
from grating_core.results import Generation
from tests.core.conftest import WINDOW, WORDS, save_model
from tests.core.memory.conftest import load_planned_lm
from tests.core.models.test_decoders import CAUSAL, merged, save_adapter, save_decoder
from tests.core.parity import random_text

PROMPT = random_text(20, random.Random(3), WORDS)
CHAT = (
    "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"
    "{{ 'w9' if add_generation_prompt }}"
)
MESSAGES = [{"role": "system", "content": "w1 w2"}, {"role": "user", "content": "w3 w4"}]


def load(directory: Path, **settings: object) -> StreamedCausalLM:
    return StreamedCausalLM.from_pretrained(directory, **{"dtype": "float32", "device": "cpu", **settings})


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without end tokens."""
    directory = save_decoder(tmp_path_factory.mktemp("endless"), "qwen3-sliding")
    (directory / "generation_config.json").write_text('{"eos_token_id": null}')
    return directory


def by_transformers(directory: Path, max_new_tokens: int, model: torch.nn.Module | None = None) -> tuple[str, int]:
    """What transformers' own loop and tokenizer make of the prompt: text, and number of new tokens."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    if model is None:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=1
    )
    return tokenizer.decode(found[0], skip_special_tokens=True), found.shape[1] - ids.shape[1]


# What comes out


@pytest.mark.parametrize("family", CAUSAL)
def test_greedy_text_equals_transformers(family: str, tmp_path: Path) -> None:
    directory = save_decoder(tmp_path, family)
    with load(directory) as model:
        found = model.generate(PROMPT, max_new_tokens=60)
    assert (PROMPT + found.text, found.new_tokens) == by_transformers(directory, 60)
    assert len(set(found.text.split())) > 3
    assert (found.bytes_read, found.seconds_waited) == (0, 0.0)


@pytest.mark.parametrize("several", [False, True])
def test_the_models_end_token_ends_the_text(endless: Path, tmp_path: Path, several: bool) -> None:
    directory = Path(shutil.copytree(endless, tmp_path / "model"))
    full = load(directory).generate(PROMPT, max_new_tokens=30)
    assert (full.finish_reason, full.new_tokens, full.prompt_tokens) == ("length", 30, 22)
    last = full.text.split()[3]
    end = PreTrainedTokenizerFast.from_pretrained(directory).convert_tokens_to_ids(last)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, end] if several else end}))
    short = load(directory).generate(PROMPT, max_new_tokens=30)
    assert full.text.startswith(f"{short.text} {last}")
    assert short.finish_reason == "stop"
    assert short.new_tokens == by_transformers(directory, 30)[1] < 30


@pytest.mark.parametrize("changes", [{"resident": ()}, {"resident": (2, 5), "embedding_rows": 3}])
def test_a_plan_changes_nothing_but_what_is_read(llama: Path, changes: dict[str, object]) -> None:
    whole, planned = load_planned_lm(llama), load_planned_lm(llama, **changes)
    for settings in ({}, {"temperature": 0.7, "seed": 3}):
        found = planned.generate(PROMPT, max_new_tokens=9, **settings)
        assert found.text == whole.generate(PROMPT, max_new_tokens=9, **settings).text
        assert found.bytes_read >= found.new_tokens * planned.plan.bytes_read() > 0
        assert 0 < found.seconds_waited < found.seconds
        assert 0 < found.seconds_to_first < found.seconds
    planned.close()


def test_the_smallest_budget_streams(endless: Path) -> None:
    with pytest.raises(BudgetError, match=r"memory_budget=1,000,000 bytes is too small.*max_length") as told:
        load(endless, memory_budget="1MB")
    with pytest.raises(BudgetError):
        load(endless, memory_budget=told.value.smallest - 1)
    expected = load(endless).generate(PROMPT, max_new_tokens=5)
    with load(endless, memory_budget=told.value.smallest) as model:
        assert model.plan.resident == ()
        assert model.generate(PROMPT, max_new_tokens=5).text == expected.text
    with load(endless, memory_budget=told.value.resident) as model:
        assert model.plan.streamed == ()
        assert model.plan.table_resident
        assert model.generate(PROMPT, max_new_tokens=5).text == expected.text
    with pytest.raises(BudgetError) as shorter:
        load(endless, memory_budget=1, max_length=WINDOW // 2)
    assert shorter.value.smallest < told.value.smallest


def test_the_longest_text(endless: Path) -> None:
    model = load(endless)
    assert model.max_length == WINDOW
    found = model.generate(PROMPT, max_new_tokens=WINDOW - 22)
    assert found.new_tokens == WINDOW - 22
    with pytest.raises(
        ValueError, match=rf"22 tokens, which with max_new_tokens={WINDOW - 21}.*max_length={WINDOW}"
    ):
        model.generate(PROMPT, max_new_tokens=WINDOW - 21)


def test_messages_go_through_the_chat_template(endless: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(endless, tmp_path / "model"))
    with pytest.raises(ValueError, match="no chat template; give a string"):
        load(directory).generate(MESSAGES)
    (directory / "chat_template.jinja").write_text(CHAT)
    model = load(directory)
    found = model.generate(MESSAGES, max_new_tokens=5)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    assert found.prompt_tokens == len(ids) == 7
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    expected = reference.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False, pad_token_id=1)[0, 7:]
    assert found.text.split() == tokenizer.decode(expected).split()
    (directory / "chat_template.jinja").write_text("{{ raise_exception('no system role') }}")
    with pytest.raises(ValueError, match=r"prompt: the chat template.*no system role"):
        load(directory).generate(MESSAGES)


def test_an_adapter_is_merged(tmp_path: Path) -> None:
    base = save_decoder(tmp_path / "base", "llama-tied")
    adapter = save_adapter(tmp_path / "adapter", base)
    expected = by_transformers(base, 12, merged(base, adapter, 1.5))[0]
    assert PROMPT + load(base, adapter=adapter).generate(PROMPT, max_new_tokens=12).text == expected
    streamed = load_planned_lm(base, adapter=adapter, resident=())
    assert PROMPT + streamed.generate(PROMPT, max_new_tokens=12).text == expected
    streamed.close()


def test_an_adapter_of_the_output_embedding_unties_it(tmp_path: Path) -> None:
    base = save_decoder(tmp_path / "base", "llama-tied")
    adapter = save_adapter(tmp_path / "adapter", base)
    down, up = torch.randn(4, 32), torch.randn(210, 4)
    path = adapter / "adapter_model.safetensors"
    name = "base_model.model.lm_head.lora_{}.weight"
    save_file(load_file(path) | {name.format("A"): down, name.format("B"): up}, path)
    with load(base, adapter=adapter) as model:
        table = model.model.outside["table.weight"]
        torch.testing.assert_close(model.model.head["vocabulary.weight"], table + 1.5 * up @ down)


# Streaming


def test_the_stream_is_the_text(endless: Path) -> None:
    model = load(endless)
    whole = model.generate(PROMPT, max_new_tokens=8)
    generations = []

    def listen():
        generations.append((yield from model.stream(PROMPT, max_new_tokens=8)))

    pieces = list(listen())
    assert "".join(pieces) == whole.text
    assert len(pieces) > 3
    (streamed,) = generations
    assert (streamed.text, streamed.finish_reason, streamed.new_tokens) == (whole.text, "length", 8)


@pytest.mark.parametrize(("start", "length"), [(9, 1), (10, 6), (17, 11)])
def test_stop_strings_across_tokens(endless: Path, start: int, length: int) -> None:
    model = load(endless)
    full = model.generate(PROMPT, max_new_tokens=30).text
    stop = full[start : start + length]
    found = model.generate(PROMPT, max_new_tokens=30, stop=["never", stop])
    assert found.text == full[: full.find(stop)]
    assert (found.finish_reason, found.new_tokens < 30) == ("stop", True)
    assert "".join(model.stream(PROMPT, max_new_tokens=30, stop=[stop])) == found.text
    assert model.generate(PROMPT, max_new_tokens=30, stop=[full + "more"]).text == full


def test_seeds_reproduce(endless: Path) -> None:
    model = load(endless)
    texts = [
        model.generate(PROMPT, max_new_tokens=20, temperature=2.0, seed=seed).text
        for seed in (1, 1, 2, None, None)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 4
    greedy = model.generate(PROMPT, max_new_tokens=20).text
    assert model.generate(PROMPT, max_new_tokens=20, temperature=2.0, top_p=1e-6).text == greedy


def test_streams_side_by_side_do_not_mix(endless: Path) -> None:
    other = random_text(20, random.Random(4), WORDS)
    model = load_planned_lm(endless, resident=())
    alone = [model.generate(prompt, max_new_tokens=10).text for prompt in (PROMPT, other)]
    streams = [model.stream(prompt, max_new_tokens=10) for prompt in (PROMPT, other)]
    turns = list(zip_longest(*streams, fillvalue=""))
    assert len(turns) > 3
    assert ["".join(pieces) for pieces in zip(*turns, strict=True)] == alone
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(model.generate, prompt, max_new_tokens=10) for prompt in (PROMPT, other) * 4]
        assert [future.result().text for future in futures] == alone * 4
    model.close()


def test_a_stream_that_is_left_leaves_the_model_usable(endless: Path) -> None:
    model = load_planned_lm(endless, resident=())
    expected = model.generate(PROMPT, max_new_tokens=10).text
    stream = model.stream(PROMPT, max_new_tokens=10)
    next(stream)
    stream.close()
    assert list(stream) == []
    assert model.generate(PROMPT, max_new_tokens=10).text == expected
    model.close()


def test_an_interrupted_call_leaves_the_model_usable(endless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_planned_lm(endless, resident=())
    expected = model.generate(PROMPT, max_new_tokens=10).text
    calls = []
    layer = model.model.layer

    def interrupted(number: int) -> object:
        calls.append(number)
        if calls.count(4) == 3:  # within the third token
            raise KeyboardInterrupt
        return layer(number)

    with monkeypatch.context() as patch:
        patch.setattr(model.model, "layer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.generate(PROMPT, max_new_tokens=10)
    assert model.generate(PROMPT, max_new_tokens=10).text == expected
    model.close()


def test_closing(endless: Path) -> None:
    with load_planned_lm(endless, resident=()) as model:
        stream = model.stream(PROMPT, max_new_tokens=10)
        next(stream)
    for call in (lambda: model.generate(PROMPT), lambda: model.stream(PROMPT), lambda: next(stream)):
        with pytest.raises(RuntimeError, match="has been closed"):
            call()
    model.close()


# What goes wrong


@pytest.mark.parametrize(
    ("prompt", "settings", "told"),
    [
        ("", {}, "prompt='' is empty"),
        ([], {}, r"prompt=\[\] is empty"),
        (7, {}, "not a int"),
        (["hello"], {}, r"prompt\[0\]='hello' must be a message"),
        ([MESSAGES[0], {"role": "user"}], {}, r"prompt\[1\]=.*must be a message"),
        ([{"role": "tool", "content": "x"}], {}, "roles are system, user, assistant"),
        (PROMPT, {"max_new_tokens": 0}, "max_new_tokens=0"),
        (PROMPT, {"max_new_tokens": 1.5}, "max_new_tokens=1.5"),
        (PROMPT, {"temperature": -0.1}, "temperature=-0.1"),
        (PROMPT, {"temperature": float("nan")}, "temperature=nan"),
        (PROMPT, {"top_p": 0}, "top_p=0"),
        (PROMPT, {"top_p": 1.01}, "top_p=1.01"),
        (PROMPT, {"seed": -1}, "seed=-1"),
        (PROMPT, {"seed": "x"}, "seed='x'"),
        (PROMPT, {"stop": "end"}, "stop='end' must be a list"),
        (PROMPT, {"stop": ["end", ""]}, r"stop=\['end', ''\] has ''"),
    ],
)
def test_bad_input_is_refused_at_once(endless: Path, prompt: object, settings: dict, told: str) -> None:
    model = load(endless)
    with pytest.raises(ValueError, match=told):
        model.stream(prompt, **{"max_new_tokens": 5, **settings})
    with pytest.raises(ValueError, match=told):
        model.generate(prompt, **{"max_new_tokens": 5, **settings})


@pytest.mark.parametrize("family", ["bert", "llama", "qwen2"])
def test_other_models_are_refused(tmp_path: Path, family: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"does not generate text; supported are LlamaForCausalLM"):
        load(save_model(tmp_path, family))


def test_layerwise_rerankers_are_refused(tmp_path: Path) -> None:
    shape = {"vocab_size": 10, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    fields = {"architectures": ["LayerWiseMiniCPMForCausalLM"], "num_attention_heads": 1, **shape}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UnsupportedModelError, match="does not generate text"):
        load(tmp_path)


def test_damaged_settings_are_named(endless: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(endless, tmp_path / "model"))
    (directory / "generation_config.json").write_text("{")
    with pytest.raises(ModelNotFoundError, match=r"generation_config\.json"):
        load(directory)


@pytest.mark.parametrize("changes", [{"resident": ()}, {"embedding_rows": 3}], ids=["layers", "rows"])
def test_a_file_that_is_cut_while_generating_may_come_back(tmp_path: Path, changes: dict[str, object]) -> None:
    directory = save_decoder(tmp_path / "model", "llama")
    (directory / "generation_config.json").write_text('{"eos_token_id": null}')
    model = load_planned_lm(directory, **changes)
    expected = model.generate(PROMPT, max_new_tokens=20)
    files = {path: path.read_bytes() for path in directory.glob("*.safetensors")}
    stream = model.stream(PROMPT, max_new_tokens=20)
    next(stream)
    for path in files:
        os.truncate(path, path.stat().st_size // 2)
    for go_on in (lambda: list(stream), lambda: model.generate(PROMPT, max_new_tokens=20)):
        with pytest.raises(FileError, match=r"safetensors.*reading model"):
            go_on()
    for path, content in files.items():
        path.write_bytes(content)
    found = model.generate(PROMPT, max_new_tokens=20)
    assert (found.text, found.finish_reason) == (expected.text, expected.finish_reason)
    model.close()


def test_a_generation_is_a_plain_record(endless: Path) -> None:
    found = load(endless).generate(PROMPT, max_new_tokens=1)
    assert isinstance(found, Generation)
    assert found.seconds == found.seconds_to_first
