"""Configurations that are not of the weights beside them, and mathematics that are not implemented."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from grating_core import GratingError, ModelNotFoundError, StreamedCausalLM, UnsupportedModelError
from grating_core.memory.meter import resident_memory
from grating_core.models.families import FAMILIES
from tests.core.conftest import DECODER, SIZES, WORDS, save_model, save_tokenizer
from tests.core.parity import TOLERANCE, load, padded_scores

# Without w3, whose number is among NONSENSE: transformers takes each pad_token_id for padding.
PAIRS = [("w1 w2", "w8 w4 w5 w6"), ("w1 w2", "w7"), ("w9", "w1 w2 w8")]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models by name; ``lm`` is a language model whose output embedding is its embedding table."""
    made = {
        name: save_model(tmp_path_factory.mktemp(name), name)
        for name in ("bert", "xlm-roberta", "qwen3", "gemma2")
    }
    made["lm"] = tmp_path_factory.mktemp("lm")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, **DECODER, tie_word_embeddings=True)).save_pretrained(made["lm"])
    save_tokenizer(made["lm"], types=False)
    return made


@pytest.fixture
def copy(sources: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(sources[name], tmp_path / name))


def change(directory: Path, file: str = "config.json", **fields: Any) -> None:
    path = directory / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("family", ["bert", "qwen3"])
@pytest.mark.parametrize("depth", [3, 4, 6, 9999, 10**9, 10**400, 0, -1, 4.5, True, "5", [5], float("nan")])
def test_another_number_of_layers_is_refused_before_anything_is_built(
    copy: Callable[[str], Path], family: str, depth: Any
) -> None:
    change(directory := copy(family), num_hidden_layers=depth, layer_types=None)
    started = perf_counter()
    with pytest.raises(ModelNotFoundError, match=r"config\.json has num_hidden_layers="):
        load(directory)
    assert perf_counter() - started < 5


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("bert", "hidden_size", 10**12),
        ("bert", "hidden_size", 64),
        ("bert", "hidden_size", "32"),
        ("bert", "vocab_size", 209),
        ("bert", "vocab_size", 10**11),
        ("bert", "max_position_embeddings", 10**13),
        ("bert", "max_position_embeddings", 95),
        ("bert", "type_vocab_size", 3),
        ("bert", "intermediate_size", 10**12),
        ("bert", "intermediate_size", 47),
        ("bert", "num_attention_heads", 0),
        ("bert", "num_attention_heads", -4),
        ("bert", "layer_norm_eps", float("nan")),
        ("bert", "layer_norm_eps", float("inf")),
        ("bert", "layer_norm_eps", "small"),
        ("bert", "layer_norm_eps", 0),
        ("qwen3", "num_attention_heads", 10**9),
        ("qwen3", "num_key_value_heads", 3),
        ("qwen3", "num_key_value_heads", 0),
        ("qwen3", "head_dim", 10**9),
        ("qwen3", "head_dim", None),
        ("qwen3", "rms_norm_eps", -1),
        ("qwen3", "intermediate_size", False),
        ("gemma2", "attn_logit_softcapping", 0),
        ("gemma2", "query_pre_attn_scalar", float("nan")),
        ("gemma2", "sliding_window", 0),
        ("gemma2", "sliding_window", "wide"),
    ],
)
def test_numbers_that_are_not_the_weights_are_named(
    copy: Callable[[str], Path], family: str, field: str, value: Any
) -> None:
    change(directory := copy(family), **{field: value})
    with pytest.raises(ModelNotFoundError, match=rf"config\.json .*{field}"):
        load(directory)


def test_factors_of_the_rotation_are_checked(copy: Callable[[str], Path]) -> None:
    for rope in ({"rope_type": "linear", "factor": 0}, {"rope_type": "default", "rope_theta": float("nan")}):
        directory = copy("qwen3")
        change(directory, rope_parameters=rope)
        with pytest.raises(ModelNotFoundError, match=r"config\.json has (factor|rope_theta)="):
            load(directory)
        shutil.rmtree(directory)


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize("field", ["attention_factor", "mscale", "beta_fast", "original_max_position_embeddings"])
def test_an_optional_number_of_the_rotation_must_be_a_number(copy: Callable[[str], Path], field: str) -> None:
    change(directory := copy("qwen3"), rope_parameters={**YARN, field: "4"})
    with pytest.raises(ModelNotFoundError, match=rf"config\.json has {field}='4', which must be a number"):
        load(directory)


NONSENSE = [
    -1, 0, 1, 3, 7, 10**6, 10**9, 10**18, 10**400, -(10**30), 0.5, 1e308, float("nan"), float("inf"), True, False,
    None,
    "", "x", "nan", [], [1], [[[]]], {}, {"a": 1}, {"rope_type": "yarn"}, ["full_attention"], "sliding_attention",
]  # fmt: skip


def as_transformers_takes_it(fields: dict[str, Any], intact: dict[str, Any]) -> dict[str, Any]:
    """Damage that must change nothing is undone, because transformers would refuse it, as it does 1 for 1.0."""
    known = FAMILIES[intact["architectures"][0]].defaults
    return intact | {
        name: float(value) if isinstance(known[name], float) and value is not None else value
        for name, value in fields.items()
        if name in known
    }


@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "qwen3", "gemma2"])
def test_damaged_configurations_are_refused_quickly_or_load_right(
    copy: Callable[[str], Path], sources: dict[str, Path], family: str
) -> None:
    directory = copy(family)
    path = directory / "config.json"
    intact = json.loads(path.read_text())
    names = [name for name in intact if name not in ("transformers_version", "architectures", "model_type")]
    before, refused = resident_memory(), 0
    for seed in range(50):
        source = random.Random(f"{family} {seed}")
        fields = intact | {source.choice(names): source.choice(NONSENSE) for _ in range(source.randint(1, 2))}
        path.write_text(json.dumps(fields))
        started = perf_counter()
        try:
            scores = load(directory).score(PAIRS)
        except GratingError as error:
            assert str(directory) in str(error)  # noqa: PT017 - most, but not all, raise
            refused += 1
        else:
            path.write_text(json.dumps(as_transformers_takes_it(fields, intact)))
            assert scores == pytest.approx(padded_scores(directory, PAIRS), abs=TOLERANCE), (seed, fields)
        assert perf_counter() - started < 10, (seed, fields)
    assert refused >= 15
    assert resident_memory() - before < 200 << 20


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("bert", "is_decoder", True),
        ("xlm-roberta", "is_decoder", True),
        ("bert", "position_embedding_type", "relative_key_query"),
        ("bert", "pruned_heads", {"0": [1]}),
        ("qwen3", "use_bidirectional_attention", True),
        ("gemma2", "use_bidirectional_attention", True),
        ("qwen3", "is_causal", False),
        ("qwen3", "attn_logit_softcapping", 30.0),
        ("qwen3", "final_logit_softcapping", 30.0),
        ("qwen3", "residual_multiplier", 0.2),
        ("qwen3", "scale_emb", 12),
        ("qwen3", "partial_rotary_factor", 0.5),
        ("qwen3", "num_experts", 8),
        ("qwen3", "layer_types", ["full_attention"] * 4 + ["chunked_attention"]),
        ("qwen3", "layer_types", ["full_attention"] * 4 + ["linear_attention"]),
        ("qwen3", "rope_parameters", {"rope_type": "proportional", "rope_theta": 1e4}),
        ("qwen3", "rope_scaling", {"type": "su", "factor": 2.0}),
    ],
)
def test_mathematics_that_are_not_implemented_are_refused_by_name(
    copy: Callable[[str], Path], family: str, field: str, value: Any
) -> None:
    change(directory := copy(family), **{field: value})
    with pytest.raises(UnsupportedModelError, match=rf"config\.json has ({field}|rope_type)="):
        load(directory)


def test_what_such_fields_usually_say_is_fine(copy: Callable[[str], Path], sources: dict[str, Path]) -> None:
    change(
        directory := copy("qwen3"),
        attn_logit_softcapping=None, residual_multiplier=1.0, num_experts=0, is_causal=True,
        layer_types=["full_attention"] * 5, use_sliding_window=False, sliding_window=4096, pruned_heads={},
    )  # fmt: skip
    assert load(directory).score(PAIRS) == load(sources["qwen3"]).score(PAIRS)


def add_tensors(directory: Path, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    path = directory / "model.safetensors"
    weights = load_file(path) | tensors
    save_file(weights, path, {"format": "pt"})
    return weights


def test_weights_of_a_layer_that_nothing_is_done_with_are_refused(copy: Callable[[str], Path]) -> None:
    add_tensors(
        directory := copy("bert"),
        **{"bert.encoder.layer.0.attention.self.distance_embedding.weight": torch.zeros(191, 8)},
    )
    with pytest.raises(UnsupportedModelError, match=r"stores bert\.encoder\.layer\.0\.attention\.self\.distance"):
        load(directory)


def test_what_older_checkpoints_store_besides_is_left_out(
    copy: Callable[[str], Path], sources: dict[str, Path]
) -> None:
    add_tensors(directory := copy("qwen3"), **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(6)})
    assert load(directory).score(PAIRS) == load(sources["qwen3"]).score(PAIRS)


@pytest.mark.parametrize(
    "parts",
    [
        ("qweight", "qzeros", "scales"),  # AWQ
        ("qweight", "qzeros", "scales", "g_idx"),  # GPTQ
        ("weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"),
        ("weight", "SCB"),  # bitsandbytes in 8 bits
        ("weight_packed", "weight_scale", "weight_shape"),  # compressed-tensors
        ("weight", "weight_scale_inv"),  # FP8 in blocks
    ],
)
def test_quantised_weights_are_told_as_such(copy: Callable[[str], Path], parts: tuple[str, ...]) -> None:
    path = (directory := copy("lm")) / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    weights |= {f"model.layers.1.mlp.up_proj.{part}": torch.zeros(4, 6, dtype=torch.int32) for part in parts}
    save_file(weights, path, {"format": "pt"})
    for loads in (load, StreamedCausalLM.from_pretrained):
        with pytest.raises(
            UnsupportedModelError, match=r"weights are quantised.*Take the checkpoint it was made from"
        ):
            loads(directory)


def test_a_tied_pair_may_be_stored_under_either_name(
    copy: Callable[[str], Path], sources: dict[str, Path]
) -> None:
    directory = copy("lm")
    path = directory / "model.safetensors"
    weights = load_file(path)
    assert "lm_head.weight" not in weights
    with StreamedCausalLM.from_pretrained(directory, device="cpu") as model:
        expected = model.generate("w1 w2 w3", max_new_tokens=5).text
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, path, {"format": "pt"})
    with StreamedCausalLM.from_pretrained(directory, device="cpu") as model:
        assert model.generate("w1 w2 w3", max_new_tokens=5).text == expected


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname", "a/../../b", "..\\x", "C:\\x", ""])
def test_an_index_names_files_of_the_directory_only(copy: Callable[[str], Path], name: str) -> None:
    directory = copy("bert")
    shutil.copy(directory / "model.safetensors", directory.parent / "outside.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelNotFoundError, match="not a file in the model's own directory"):
        load(directory)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json", "modules.json"])
def test_json_that_is_nested_without_end_is_damaged(copy: Callable[[str], Path], file: str) -> None:
    ((directory := copy("bert")) / file).write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(ModelNotFoundError, match=f"{file} cannot be read"):
        load(directory)


@pytest.mark.parametrize(
    "file",
    ["config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
     "vocab.txt", "chat_template.jinja", "generation_config.json", "modules.json"],
)  # fmt: skip
def test_a_named_pipe_is_no_file(copy: Callable[[str], Path], file: str) -> None:
    directory = copy("bert")
    (directory / file).unlink(missing_ok=True)
    os.mkfifo(directory / file)
    with pytest.raises(ModelNotFoundError, match=f"{file} is not a regular file"):
        load(directory)


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(copy: Callable[[str], Path]) -> None:
    directory = copy("bert")
    path = directory / "tokenizer.json"
    fields = json.loads(path.read_text())
    fields["model"]["vocab"]["w200"] = 209  # the last row there is
    path.write_text(json.dumps(fields))
    assert len(load(directory).score([("w1", "w200")])) == 1
    for change_to in ("vocab", "added"):
        changed = json.loads(path.read_text())
        if change_to == "vocab":
            changed["model"]["vocab"]["w200"] = 210
        else:
            changed["added_tokens"].append(changed["added_tokens"][0] | {"id": 210, "content": "[X]"})
            changed["model"]["vocab"]["[X]"] = 210
        path.write_text(json.dumps(changed))
        with pytest.raises(ModelNotFoundError, match=r"tokenizer\.json has the token .* of id 210.*config\.json"):
            load(directory)
        path.write_text(json.dumps(fields))
    assert len(WORDS) == 200


def test_a_language_models_tokenizer_likewise(copy: Callable[[str], Path]) -> None:
    path = (directory := copy("lm")) / "tokenizer.json"
    fields = json.loads(path.read_text())
    fields["model"]["vocab"]["w200"] = 300
    path.write_text(json.dumps(fields))
    with pytest.raises(ModelNotFoundError, match=r"tokenizer\.json has the token 'w200' of id 300.*config\.json"):
        StreamedCausalLM.from_pretrained(directory, device="cpu")
