"""What we rely on in transformers and the libraries below it, each named once.

The tests of our own code would fail as well where one of these is gone, but in many places, and without saying
whose doing it is. ``make test-oldest`` and ``make test-newest`` run this folder with the ends of every range.
"""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import nn
from transformers import AttentionInterface, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils.chat_template_utils import render_jinja_template

from grating_core.models.families import FAMILIES as DESCRIBED
from tests.core.conftest import DECODER, FAMILIES, SIZES, save_model

OURS = "grating_contract"


class Reached(Exception):
    """The attention function was called with what a layer was given."""


def attention(module: nn.Module, query: Any, key: Any, value: Any, mask: None, **keywords: Any) -> None:
    raise Reached(module, query.shape, key.shape, mask, keywords)


AttentionInterface.register(OURS, attention)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_layer_hands_our_keyword_to_our_attention(name: str) -> None:
    """Whatever a layer does not know travels through it; the name ``grating`` is nobody else's."""
    module = FAMILIES[name]().eval()
    module.set_attn_implementation(OURS)
    family = DESCRIBED[type(module).__name__]
    layer = module.get_submodule(family.layers)[0]
    hidden = torch.zeros(1, 7, module.config.hidden_size)
    token = object()
    arguments = family.layer_arguments(module, layer, hidden, torch.arange(7)[None])
    with pytest.raises(Reached) as reached:
        layer(hidden, attention_mask=None, grating=token, **arguments)
    called_by, query, key, mask, keywords = reached.value.args
    assert keywords["grating"] is token
    assert mask is None
    assert query[:1] + query[2:3] == key[:1] + key[2:3] == (1, 7)
    assert "scaling" in keywords
    assert getattr(called_by, "is_causal", False) is family.causal


@pytest.mark.parametrize("name", sorted(DESCRIBED))
def test_a_family_has_its_parts_where_we_look(name: str) -> None:
    family = DESCRIBED[name]
    sizes: dict[str, Any] = {**SIZES, "max_position_embeddings": 32}
    if family.causal:
        sizes |= DECODER
    with torch.device("meta"):
        module = family.module_class(family.module_class.config_class(**sizes))
    layers = module.get_submodule(family.layers)
    assert isinstance(layers, nn.ModuleList)
    assert len(layers) == SIZES["num_hidden_layers"]
    assert isinstance(module.get_submodule(family.embedding), nn.Embedding)
    assert "hidden_states" in inspect.signature(layers[0].forward).parameters
    for part in (*family.head, family.norm):
        assert part is None or module.get_submodule(part) is not None


def test_gemmas_embedding_scales_by_itself() -> None:
    """Before transformers 5.4 the model did, around the layers that we drive."""
    for name in ("gemma", "gemma2"):
        module = FAMILIES[name]()
        table = module.model.embed_tokens
        plain = nn.functional.embedding(torch.tensor([[5]]), table.weight)
        torch.testing.assert_close(table(torch.tensor([[5]])), plain * SIZES["hidden_size"] ** 0.5)


def test_a_language_model_is_built_from_a_configuration_alone() -> None:
    config = LlamaConfig.from_dict({**SIZES, **DECODER, "architectures": ["LlamaForCausalLM"]})
    with torch.device("meta"):
        module = LlamaForCausalLM(config)
    names = set(dict(module.named_parameters()))
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= names
    assert {f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")} <= names
    assert module.config.hidden_size == SIZES["hidden_size"]


def test_generation_processors_take_ids_and_scores() -> None:
    chain = transformers.LogitsProcessorList(
        [transformers.TemperatureLogitsWarper(0.5), transformers.TopPLogitsWarper(0.5)]
    )
    scores = chain(torch.tensor([[1]]), torch.tensor([[4.0, 0.0, 1.0]]))
    assert scores.tolist() == [[8.0, -torch.inf, -torch.inf]]


def test_a_chat_template_is_rendered_without_a_tokenizer() -> None:
    rendered, _ = render_jinja_template(
        conversations=[[{"role": "user", "content": "Hello"}]],
        chat_template="{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ eos_token }}",
        add_generation_prompt=True,
        eos_token="</s>",
    )
    assert rendered == ["<user>Hello</s>"]


def test_tokenizers_are_fast_ones_with_a_backend(tmp_path: Path) -> None:
    wrapped = AutoTokenizer.from_pretrained(save_model(tmp_path, "bert"), trust_remote_code=False)
    assert wrapped.is_fast
    backend = wrapped.backend_tokenizer
    assert isinstance(backend, Tokenizer)
    backend.no_truncation()
    backend.no_padding()
    ids = backend.encode("w1 w2", "w3", add_special_tokens=True).ids
    assert ids == wrapped("w1 w2", "w3")["input_ids"]
    assert backend.encode_batch_fast(["w1 w2"], add_special_tokens=False)[0].ids == ids[1:3]
    assert backend.decode(ids, skip_special_tokens=True) == "w1 w2 w3"


def test_text_is_decoded_token_by_token_from_behind_a_prompt(tmp_path: Path) -> None:
    save_model(tmp_path, "bert")
    backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    first, second = (backend.token_to_id(word) for word in ("w1", "w2"))
    stream = DecodeStream([first], skip_special_tokens=True)
    assert stream.step(backend, second) == " w2"


def test_arrays_and_tensors_share_memory() -> None:
    array = np.arange(3, dtype=np.float32)
    torch.from_numpy(array)[0] = 7
    assert array[0] == 7
