"""What we rely on in transformers and the libraries below it, each named once.

No layer of transformers computes a request. It renders chat templates, makes unusual tokenizers and those of GGUF
files, and the lab trains its models. The tests of our own code would fail as well where one of these is gone, but
in many places, and without saying whose doing it is. ``make test-oldest`` and ``make test-newest`` run this folder
with the ends of every range.
"""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging
from transformers.utils.chat_template_utils import render_jinja_template

from tests.core.conftest import DECODER, SIZES, save_model

WIDTH, INNER, ROWS = 32, 64, 40


@pytest.fixture
def packed(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """A GGUF file of one Llama layer, and its matrix W_u, which is stored in 8 bits."""
    chance = np.random.default_rng(0)
    path = tmp_path / "tiny.gguf"
    file = gguf.GGUFWriter(path, "llama")
    file.add_block_count(1)
    file.add_context_length(64)
    file.add_embedding_length(WIDTH)
    file.add_feed_forward_length(INNER)
    file.add_head_count(4)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_vocab_size(ROWS)
    square = {f"blk.0.attn_{part}": (WIDTH, WIDTH) for part in ("q", "k", "v", "output")}
    norms = dict.fromkeys(("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"), (WIDTH,))
    tables = dict.fromkeys(("token_embd", "output"), (ROWS, WIDTH))
    shapes = {**square, **norms, **tables, "blk.0.ffn_gate": (INNER, WIDTH), "blk.0.ffn_down": (WIDTH, INNER)}
    for name, shape in shapes.items():
        file.add_tensor(f"{name}.weight", chance.normal(size=shape).astype(np.float32))
    up = chance.normal(size=(INNER, WIDTH)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q8_0
    file.add_tensor("blk.0.ffn_up.weight", gguf.quants.quantize(up, kind), raw_dtype=kind)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path, up


def test_a_gguf_file_is_unpacked_into_weights_with_the_names_of_a_checkpoint(
    packed: tuple[Path, np.ndarray],
) -> None:
    path, up = packed
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type] == "LlamaForCausalLM"
    assert config.to_dict()["intermediate_size"] == INNER
    # Releases that know this class may leave weights packed.
    known = getattr(transformers, "GgufConfig", None)
    how = {} if known is None else {"quantization_config": known(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, trust_remote_code=False, dtype=torch.float32, **how
    )
    weights = model.state_dict()
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= weights.keys()
    np.testing.assert_allclose(weights["model.layers.0.mlp.up_proj.weight"].numpy(), up, atol=0.02)


def test_a_language_model_to_train_is_built_from_a_configuration_alone() -> None:
    config = LlamaConfig.from_dict({**SIZES, **DECODER, "architectures": ["LlamaForCausalLM"]})
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    layers = model.model.layers
    assert len(layers) == SIZES["num_hidden_layers"]
    assert all(isinstance(getattr(layers[0].mlp, f"{part}_proj"), nn.Linear) for part in ("gate", "up", "down"))
    assert callable(layers[0].mlp.act_fn)
    assert model.config.hidden_size == SIZES["hidden_size"]


def test_progress_bars_can_be_asked_for_and_hidden() -> None:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    assert not logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    assert logging.is_progress_bar_enabled()
    if not shown:
        logging.disable_progress_bar()


def test_a_chat_template_is_rendered_without_a_tokenizer() -> None:
    rendered, _ = render_jinja_template(
        conversations=[[{"role": "user", "content": "Hello"}]],
        chat_template="{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ eos_token }}",
        add_generation_prompt=True,
        eos_token="</s>",
    )
    assert rendered == ["<user>Hello</s>"]


def test_tokenizers_are_fast_ones_with_a_backend(tmp_path: Path) -> None:
    wrapped = AutoTokenizer.from_pretrained(
        save_model(tmp_path, "bert"), trust_remote_code=False, local_files_only=True
    )
    assert wrapped.is_fast
    assert "token_type_ids" in wrapped.model_input_names
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
