"""Encoders whose own code is never run, in their official file layout, against their equations in plain torch.

The references compute one padded batch, as the official code does, and share nothing with grating's layers.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from grating_core import ModelNotFoundError, UnsupportedModelError
from grating_core.models.packing import IN_8_BITS, Packing
from tests.core.conftest import WINDOW, WORDS, save_tokenizer
from tests.core.memory.conftest import PLANS, load_planned
from tests.core.parity import TOLERANCE, load, random_text, saved_tokenizer

Weights = dict[str, Tensor]
D, F, HEADS, DEPTH, ROWS = 32, 48, 4, 3, 210
COMMON: dict[str, Any] = {
    "vocab_size": ROWS, "hidden_size": D, "intermediate_size": F, "num_attention_heads": HEADS,
    "num_hidden_layers": DEPTH, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "classifier_dropout": None,
    "initializer_range": 0.02, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "torch_dtype": "float32",
    "pad_token_id": 1,
}  # fmt: skip
GTE = COMMON | {
    "architectures": ["NewForSequenceClassification"], "model_type": "new",
    "auto_map": {
        "AutoConfig": "Alibaba-NLP/new-impl--configuration.NewConfig",
        "AutoModelForSequenceClassification": "Alibaba-NLP/new-impl--modeling.NewForSequenceClassification",
    },
    "layer_norm_eps": 1e-12, "layer_norm_type": "layer_norm", "logn_attention_clip1": False,
    "logn_attention_scale": False, "max_position_embeddings": WINDOW, "pack_qkv": True,
    "position_embedding_type": "rope", "rope_scaling": {"factor": 8.0, "type": "ntk"}, "rope_theta": 20000,
    "type_vocab_size": 1, "unpad_inputs": False, "use_memory_efficient_attention": False,
}  # fmt: skip
JINA = COMMON | {
    "architectures": ["XLMRobertaForSequenceClassification"],
    "auto_map": {
        "AutoConfig": "configuration_xlm_roberta.XLMRobertaFlashConfig",
        "AutoModelForSequenceClassification": "modeling_xlm_roberta.XLMRobertaForSequenceClassification",
    },
    "emb_pooler": None, "layer_norm_eps": 1e-5, "load_trained_adapters": False, "lora_adaptations": None,
    "lora_rank": 4, "matryoshka_dimensions": None, "max_position_embeddings": WINDOW + 2,
    "position_embedding_type": "absolute", "truncate_dim": None, "type_vocab_size": 1, "use_flash_attn": True,
}  # fmt: skip


def linear(weights: Weights, name: str, states: Tensor) -> Tensor:
    return states @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", torch.zeros(()))


def norm(weights: Weights, name: str, states: Tensor, eps: float) -> Tensor:
    centred = states - states.mean(-1, keepdim=True)
    size = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return centred / size * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attention of heads ``[batch, tokens, heads, size]``, with what is masked out of the padding."""
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    scores = scores.masked_fill(mask[:, None, None] == 0, torch.finfo(torch.float32).min)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).flatten(2)


def gte(config: dict[str, Any], weights: Weights, batch: dict[str, Tensor]) -> Tensor:
    ids, mask, eps = batch["input_ids"], batch["attention_mask"], config["layer_norm_eps"]
    states = weights["new.embeddings.word_embeddings.weight"][ids]
    if config["type_vocab_size"]:
        types = batch.get("token_type_ids", torch.zeros_like(ids))
        states = states + weights["new.embeddings.token_type_embeddings.weight"][types]
    states = norm(weights, "new.embeddings.LayerNorm", states, eps)

    size = D // HEADS
    scaling = config["rope_scaling"] or {"factor": 1.0}
    factor = scaling["factor"]
    rates = (config["rope_theta"] * factor) ** -(torch.arange(0, size, 2).double() / size) / factor ** (2 / size)
    angles = (torch.arange(ids.shape[1])[:, None] * rates).repeat(1, 2)
    cosine, sine = angles.cos().float()[:, None], angles.sin().float()[:, None]

    def turned(heads: Tensor) -> Tensor:
        first, second = heads.chunk(2, -1)
        return heads * cosine + torch.cat((-second, first), -1) * sine

    for number in range(DEPTH):
        layer = f"new.encoder.layer.{number}"
        if config["pack_qkv"]:
            parts = linear(weights, f"{layer}.attention.qkv_proj", states).split(D, -1)
        else:
            parts = tuple(linear(weights, f"{layer}.attention.{name}_proj", states) for name in "qkv")
        query, key, value = (part.unflatten(-1, (HEADS, size)) for part in parts)
        attended = linear(weights, f"{layer}.attention.o_proj", attend(turned(query), turned(key), value, mask))
        states = norm(weights, f"{layer}.attn_ln", states + attended, eps)
        up, gate = linear(weights, f"{layer}.mlp.up_gate_proj", states).split(F, -1)
        inner = linear(weights, f"{layer}.mlp.down_proj", functional.gelu(gate) * up)
        states = norm(weights, f"{layer}.mlp_ln", states + inner, eps)
    return linear(weights, "classifier", linear(weights, "new.pooler.dense", states[:, 0]).tanh())


def jina(config: dict[str, Any], weights: Weights, batch: dict[str, Tensor]) -> Tensor:
    ids, mask, eps = batch["input_ids"], batch["attention_mask"], config["layer_norm_eps"]
    real = (ids != config["pad_token_id"]).long()
    positions = real.cumsum(1) * real + config["pad_token_id"]
    states = (
        weights["roberta.embeddings.word_embeddings.weight"][ids]
        + weights["roberta.embeddings.position_embeddings.weight"][positions]
        + weights["roberta.embeddings.token_type_embeddings.weight"][0]
    )
    states = norm(weights, "roberta.emb_ln", states, eps)
    for number in range(DEPTH):
        layer = f"roberta.encoder.layers.{number}"
        query, key, value = linear(weights, f"{layer}.mixer.Wqkv", states).unflatten(-1, (3, HEADS, -1)).unbind(2)
        attended = linear(weights, f"{layer}.mixer.out_proj", attend(query, key, value, mask))
        states = norm(weights, f"{layer}.norm1", states + attended, eps)
        inner = functional.gelu(linear(weights, f"{layer}.mlp.fc1", states))
        states = norm(weights, f"{layer}.norm2", states + linear(weights, f"{layer}.mlp.fc2", inner), eps)
    return linear(weights, "classifier.out_proj", linear(weights, "classifier.dense", states[:, 0]).tanh())


def random_weights(shapes: dict[str, tuple[int, ...]]) -> Weights:
    """Large weights, so that scores differ, and norms that are not those of an untrained model."""
    return {
        name: torch.randn(shape) * 0.2 + float(len(shape) == 1 and name.endswith("weight"))
        for name, shape in shapes.items()
    }


def with_bias(names: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{kind}": shape if kind == "weight" else shape[:1]
            for name, shape in names.items() for kind in ("weight", "bias")}  # fmt: skip


def gte_weights(config: dict[str, Any]) -> Weights:
    shapes = {"new.embeddings.word_embeddings.weight": (ROWS, D)}
    if config["type_vocab_size"]:
        shapes["new.embeddings.token_type_embeddings.weight"] = (config["type_vocab_size"], D)
    shapes |= with_bias({"new.embeddings.LayerNorm": (D,), "new.pooler.dense": (D, D), "classifier": (1, D)})
    for number in range(DEPTH):
        layer = f"new.encoder.layer.{number}"
        names = ["qkv_proj"] if config["pack_qkv"] else ["q_proj", "k_proj", "v_proj"]
        shapes |= with_bias(
            {f"{layer}.attention.{name}": (3 * D // len(names), D) for name in names}
            | {f"{layer}.attention.o_proj": (D, D), f"{layer}.mlp.down_proj": (D, F)}
            | {f"{layer}.attn_ln": (D,), f"{layer}.mlp_ln": (D,)}
        )
        shapes[f"{layer}.mlp.up_gate_proj.weight"] = (2 * F, D)
    return random_weights(shapes)


def jina_weights(config: dict[str, Any]) -> Weights:
    shapes = {
        "roberta.embeddings.word_embeddings.weight": (ROWS, D),
        "roberta.embeddings.position_embeddings.weight": (config["max_position_embeddings"], D),
        "roberta.embeddings.token_type_embeddings.weight": (1, D),
    } | with_bias({"roberta.emb_ln": (D,), "classifier.dense": (D, D), "classifier.out_proj": (1, D)})
    for number in range(DEPTH):
        layer = f"roberta.encoder.layers.{number}"
        shapes |= with_bias(
            {f"{layer}.mixer.Wqkv": (3 * D, D), f"{layer}.mixer.out_proj": (D, D), f"{layer}.mlp.fc1": (F, D)}
            | {f"{layer}.mlp.fc2": (D, F), f"{layer}.norm1": (D,), f"{layer}.norm2": (D,)}
        )
    return random_weights(shapes)


Reference = Callable[[dict[str, Any], Weights, dict[str, Tensor]], Tensor]
KINDS: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], Weights], Reference]] = {
    "gte": (GTE, gte_weights, gte),
    "gte-english": (GTE | {"type_vocab_size": 0, "rope_scaling": None, "rope_theta": 500000}, gte_weights, gte),
    "gte-typed": (GTE | {"type_vocab_size": 2, "rope_scaling": {"factor": 2.0, "type": "ntk"}}, gte_weights, gte),
    "gte-unpacked": (GTE | {"pack_qkv": False}, gte_weights, gte),
    "jina": (JINA, jina_weights, jina),
}


def write(directory: Path, config: dict[str, Any], weights: Weights, *, types: bool = False) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(directory, types=types)
    return directory


@pytest.fixture(scope="module", params=KINDS)
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Callable[..., Any]]:
    """A model's directory, and its official scores of pairs of texts."""
    torch.manual_seed(9)
    config, weights_of, reference = KINDS[request.param]
    weights = weights_of(config)
    directory = write(
        tmp_path_factory.mktemp("model") / request.param, config, weights, types=request.param == "gte-typed"
    )

    def scores(pairs: list[tuple[str, str]]) -> list[float]:
        batch = saved_tokenizer(directory)(
            *map(list, zip(*pairs, strict=True)), padding=True, truncation="only_second", max_length=WINDOW,
            return_tensors="pt",
        )  # fmt: skip
        found: list[float] = reference(config, weights, batch)[:, 0].tolist()
        return found

    return directory, scores


def random_pairs() -> list[tuple[str, str]]:
    seed = random.randrange(10**6)
    print("seed", seed)  # shown when the test fails
    source = random.Random(seed)
    return [("w1 w2", random_text(length, source, WORDS)) for length in (1, 0, 5, 90, 2 * WINDOW, 17, 33)]


@pytest.mark.parametrize("slice_tokens", [7, 10**6])
def test_scores_equal_the_published_equations(made: tuple[Path, Any], slice_tokens: int) -> None:
    directory, official = made
    pairs = random_pairs()
    expected = official(pairs)
    assert max(expected) - min(expected) > 100 * TOLERANCE
    reranker = load(directory, slice_tokens=slice_tokens)
    assert reranker.max_length == WINDOW
    assert reranker.score(pairs) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("plan", ["streamed", "all at once"])
def test_streamed_and_in_8_bits(made: tuple[Path, Any], plan: str, spill_directory: Path) -> None:
    directory, official = made
    pairs = random_pairs()
    expected = official(pairs)
    assert load_planned(directory, **PLANS[plan]).score(pairs) == pytest.approx(expected, abs=TOLERANCE)
    packing = Packing(torch.float32, IN_8_BITS)
    found = torch.tensor(load_planned(directory, packing=packing, **PLANS[plan]).score(pairs))
    assert (found - torch.tensor(expected)).abs().mean() < 0.15 * (max(expected) - min(expected))


@pytest.mark.parametrize(
    ("kind", "fields", "shown"),
    [
        ("gte", {"logn_attention_scale": True}, "logn_attention_scale=True"),
        ("gte", {"logn_attention_clip1": True}, "logn_attention_clip1=True"),
        ("gte", {"layer_norm_type": "rms_norm"}, "layer_norm_type='rms_norm'"),
        ("gte", {"position_embedding_type": "absolute"}, "position_embedding_type='absolute'"),
        ("gte", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ("gte", {"rope_scaling": {"type": "ntk", "factor": 2.0, "mixed_b": 0.6}}, "mixed_b=0.6"),
        ("jina", {"position_embedding_type": "rotary"}, "position_embedding_type='rotary'"),
        ("jina", {"lora_adaptations": ["retrieval.query"]}, "lora_adaptations=['retrieval.query']"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(
    tmp_path: Path, kind: str, fields: dict[str, Any], shown: str
) -> None:
    config, weights_of, _ = KINDS[kind]
    directory = write(tmp_path, config | fields, weights_of(config))
    with pytest.raises(UnsupportedModelError) as refusal:
        load(directory)
    assert f"config.json has {shown}" in str(refusal.value)


def test_low_rank_changes_in_the_weights_are_refused_by_name(tmp_path: Path) -> None:
    name = "roberta.encoder.layers.0.mixer.Wqkv.parametrizations.weight.0.lora_A"
    directory = write(tmp_path, JINA, jina_weights(JINA) | {name: torch.zeros(5, 4, D)})
    with pytest.raises(UnsupportedModelError, match=r"stores .*lora_A, which grating's XLMRoberta.* does not use"):
        load(directory)


def test_names_of_neither_layout_are_told(tmp_path: Path) -> None:
    weights = {name.replace("layers.", "blocks."): weight for name, weight in jina_weights(JINA).items()}
    with pytest.raises(
        ModelNotFoundError, match=r"lack \d+ tensors that XLMRobertaForSequenceClassification needs"
    ):
        load(write(tmp_path, JINA, weights))
