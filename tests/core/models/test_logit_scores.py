"""Language models whose score is made of logits by LogitScore, against sentence-transformers' CrossEncoder."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from grating_core import ModelNotFoundError, Prompt, UnsupportedModelError
from tests.core.conftest import DECODER, SIZES, randomise
from tests.core.parity import TOLERANCE, load

WINDOW = 120
MARKS = ["<|im_start|>", "<|im_end|>", "<|end|>"]
TEXT = "Is it so? It is so.\n\nThe river <b>bends</b> 'here', and here.\nA heron: it waits. (What for?) yes no\n"
WORDS = ["river", "heron", "so.", "it's", "What?", "bends\n", "\n\n", "<|im_end|", "yes", "123", "été", "(here)"]
STRUCTURED = """
{%- set texts = namespace(system="Judge it.") -%}
{%- for m in messages if m.role == "system" -%}{%- set texts.system = m.content[0].text -%}{%- endfor -%}
<|im_start|>system
{{ texts.system }}<|im_end|>
<|im_start|>user
{% for m in messages if m.role != "system" %}<{{ m.role }}>: {{ m.content[0]["text"] }}
{% endfor %}<|im_end|>
{% if add_generation_prompt %}<|im_start|>assistant
<think>

</think>

{% endif %}"""
FLAT = """
{%- for m in messages -%}
{%- if m.role == "system" -%}<|im_start|>system
{{ m.content }}<|im_end|>
{% elif m.role == "query" -%}<|im_start|>Query: {{ m.content | trim }}
{% else -%}Document: {{ m.content | trim }}.
Relevant:{% endif -%}{%- endfor -%}"""
QUERY_BEHIND = """{{ messages | selectattr("role", "eq", "document") | map(attribute="content") | first }}
Query: {{ messages | selectattr("role", "eq", "query") | map(attribute="content") | first }}<|end|>"""
NO_SYSTEM = """{%- if messages[0].role == "system" -%}{{ raise_exception("no system") }}{%- endif -%}
Q: {{ messages[0].content }} A: {{ messages[1].content }}? {{ mark | default("no mark") }}<|end|>"""
TEMPLATES = {"structured": STRUCTURED, "flat": FLAT, "query behind": QUERY_BEHIND, "no system": NO_SYSTEM}


def save_causal(
    directory: Path, template: str | None, *, prompt: str = "", no: bool = True, **settings: object
) -> Path:
    """A tiny language model that CrossEncoder saves with LogitScore."""
    torch.manual_seed(0)
    base = directory / "base"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [TEXT] * 3, trainers.BpeTrainer(vocab_size=400, special_tokens=MARKS, initial_alphabet=letters)
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>", model_max_length=WINDOW,
        additional_special_tokens=MARKS[:2], chat_template=template,
    )  # fmt: skip
    wrapped.save_pretrained(base)
    sizes = {**SIZES, **DECODER, "vocab_size": 400, "max_position_embeddings": 256, "tie_word_embeddings": False}
    model = LlamaForCausalLM(LlamaConfig(**sizes)) if no else Qwen3ForCausalLM(Qwen3Config(**sizes))
    randomise(model).save_pretrained(base)
    yes_id, no_id = (wrapped.convert_tokens_to_ids(f"Ġ{word}") for word in ("yes", "no"))
    modules = [
        Transformer(str(base), transformer_task="text-generation", **settings),
        LogitScore(yes_id, no_id if no else None),
    ]
    named = {"prompts": {"own": prompt}, "default_prompt_name": "own"} if prompt else {}
    CrossEncoder(modules=modules, device="cpu", **named).save_pretrained(str(directory / "model"))
    shutil.rmtree(base)
    return directory / "model"


def random_pairs(source: random.Random) -> list[tuple[str, str]]:
    texts = [" ".join(source.choices(WORDS, k=length)) for length in (1, 4, 9, 25, 90)]
    return [("What river? ", text) for text in (*texts, "", " \n", "It is so.", "a <b>\n")]


def check(directory: Path, pairs: list[tuple[str, str]], prompt: str | None = None, **settings: object) -> None:
    """The same tokens as the CrossEncoder's, and the same scores."""
    reference = CrossEncoder(str(directory), device="cpu", local_files_only=True)
    reranker = load(directory, instruction=prompt, **settings)
    said = prompt or reference.prompts.get(reference.default_prompt_name)
    for query, text in pairs:
        ((pair,),) = reranker.scorer.template.encode(query, [text])
        assert pair.input_ids == reference.preprocess([(query, text)], prompt=said)["input_ids"][0].tolist()
    expected = reference.predict(pairs, prompt=prompt, activation_fn=nn.Identity()).tolist()
    assert max(expected) - min(expected) > 100 * TOLERANCE
    assert reranker.score(pairs) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", ["", "Judge whether it answers."])
def test_the_chat_template_makes_the_text_of_a_pair(tmp_path: Path, name: str, prompt: str) -> None:
    if name == "no system" and prompt:
        pytest.skip("this template refuses a prompt")
    seed = random.randrange(10**6)
    print("seed", seed)  # shown when the test fails
    pairs = random_pairs(random.Random(seed))
    variables = {"add_generation_prompt": True, "mark": "Well?"}
    directory = save_causal(
        tmp_path, TEMPLATES[name], prompt=prompt, no=bool(prompt), processing_kwargs={"chat_template": variables}
    )
    # The reference cuts a query that stands behind a long document, and grating cuts the document.
    check(directory, [pair for pair in pairs if len(pair[1]) < 100] if name == "query behind" else pairs)
    if name in ("structured", "flat"):
        check(directory, pairs, "Judge it by its length.")


def test_without_a_chat_template_the_tokenizer_joins_the_two(tmp_path: Path) -> None:
    directory = save_causal(tmp_path, None, prompt="Look: ")
    assert "message" not in json.loads((directory / "sentence_bert_config.json").read_text())["modality_config"]
    check(directory, random_pairs(random.Random(1)))


def test_a_prompt_of_the_user_wins(tmp_path: Path) -> None:
    directory = save_causal(tmp_path, STRUCTURED)
    template = Prompt(pieces=("{query}", " {document}"), yes=" yes", no=" no")
    own = load(directory, template=template).score(random_pairs(random.Random(2)))
    assert own != pytest.approx(load(directory).score(random_pairs(random.Random(2))), abs=TOLERANCE)


def test_a_special_token_that_the_tokenizer_lacks_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = save_causal(tmp_path, QUERY_BEHIND)
    load(directory)
    assert "special token" not in caplog.text
    load(directory, template=Prompt(pieces=("<|im_start|>{query}<|turn|>{document}",), yes=5, no=6))
    assert "writes the special token <|turn|>, which the model's tokenizer does not have" in caplog.text


@pytest.mark.parametrize(
    ("template", "kind", "told"),
    [
        ("{{ messages[0].content | upper }} {{ messages[1].content }}", UnsupportedModelError, "does not show"),
        (
            "{{ messages[0].content }} {{ messages[1].content | escape }}",
            UnsupportedModelError,
            "changes the texts of a pair",
        ),
        ("{{ messages[0].content }}", UnsupportedModelError, "does not show the messages of the roles"),
        ("{{ raise_exception('only users') }}", ModelNotFoundError, "cannot be used for a pair: only users"),
    ],
)
def test_templates_that_do_not_carry_a_pair_are_refused(
    tmp_path: Path, template: str, kind: type[Exception], told: str
) -> None:
    directory = save_causal(tmp_path, "{{ messages }}")
    (directory / "chat_template.jinja").write_text(template)
    form = {"method": "forward", "method_output_name": "logits", "format": "flat"}
    path = directory / "sentence_bert_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"modality_config": {"text": form, "message": form}})
    )
    with pytest.raises(kind, match=told):
        load(directory)


@pytest.mark.parametrize(
    ("fields", "kind", "told"),
    [
        ({}, ModelNotFoundError, "it lacks 'true_token_id'"),
        ({"true_token_id": "yes"}, ModelNotFoundError, "must be numbers of tokens"),
        ({"true_token_id": 500}, ModelNotFoundError, "token 500"),
        ({"true_token_id": 5, "module_input_name": "scores"}, UnsupportedModelError, "module_input_name='scores'"),
    ],
)
def test_damaged_token_ids_are_refused(
    tmp_path: Path, fields: dict[str, object], kind: type[Exception], told: str
) -> None:
    directory = save_causal(tmp_path, STRUCTURED)
    (directory / "1_LogitScore/config.json").write_text(json.dumps(fields))
    with pytest.raises(kind, match=told):
        load(directory)


def test_a_model_known_by_name_keeps_what_its_score_is_divided_by(tmp_path: Path) -> None:
    """The files of zerank-2 give the logit; its card makes the probability of a fifth of it."""
    directory = save_causal(tmp_path, STRUCTURED, no=False)
    pairs = random_pairs(random.Random(5))
    expected = [score / 5.0 for score in load(directory).score(pairs)]
    named = directory.rename(tmp_path / "zerank-2")
    assert load(named).score(pairs) == pytest.approx(expected, abs=TOLERANCE)
