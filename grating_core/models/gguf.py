"""A GGUF file describes a model in words of its own: its metadata and names stand for those of a checkpoint.

The names of metadata and tensors are those that llama.cpp reads and writes:
https://github.com/ggml-org/llama.cpp, ``gguf-py/gguf/constants.py`` and ``convert_hf_to_gguf.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from grating_core.errors import FileError, ModelNotFoundError, UnsupportedModelError
from grating_core.layers.spec import Norm, Role
from grating_core.memory.blocks import READABLE
from grating_core.memory.checkpoint import Checkpoint, read_gguf_header
from grating_core.memory.gguf import GgufHeader
from grating_core.memory.header import FLOATS, StoredTensor
from grating_core.models.directory import blaming_config, describe
from grating_core.models.families import FAMILIES
from grating_core.models.family import Configuration, Family, ModelSpec

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "granite": "GraniteForCausalLM",
}
_IN_PAIRS = ("LlamaForCausalLM", "MistralForCausalLM", "GraniteForCausalLM")
"""The architectures whose queries and keys lie in the order of the pairs that rotary positions turn."""

_FIELDS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attention.causal": "is_causal",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "attention.scale": "attention_multiplier",
    "logit_scale": "logits_scaling",
    "expert_count": "num_experts",
    "attention.clamp_kqv": "clip_qkv",
    "attention.max_alibi_bias": "use_alibi",
    "attention.temperature_scale": "attn_temperature_tuning",
    "use_parallel_residual": "use_parallel_residual",
}
"""The fields of a ``config.json``, by the metadata behind the architecture's name."""

_LAYER: dict[Role | tuple[Role, ...], str] = {
    "input_norm": "attn_norm",
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    ("query", "key", "value"): "attn_qkv",
    "output": "attn_output",
    "query_norm": "attn_q_norm",
    "key_norm": "attn_k_norm",
    "attention_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    ("gate", "up"): "ffn_up",
    "down": "ffn_down",
    "output_norm": "post_ffw_norm",
}
_AROUND = {"table": "token_embd", "final_norm": "output_norm", "vocabulary": "output"}
"""The names of tensors by role, behind the layer's number and around the layers."""

_LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}  # layers of the models that scale by the width of a head's share
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_THETA = 10_000.0  # where the metadata say no base


def read_gguf_config(path: Path) -> Configuration:
    """Read the configuration of a model in a GGUF file.

    Raises:
        ModelNotFoundError: The file is damaged, or makes no sense.
        UnsupportedModelError: grating does not run the architecture, does not implement a value, or does not read
            a type of weights.
    """
    try:
        header = read_gguf_header(path)
        checkpoint = Checkpoint([path])
    except (FileError, OSError) as error:
        raise ModelNotFoundError(
            f"the weights cannot be read as GGUF ({error}); delete the file and fetch it again"
        ) from error
    with closing(checkpoint):
        architecture, family = _find(path, header.metadata)
        _check_kinds(path, header.tensors)
        with blaming_config(path):
            stated = _stated(path, header, architecture, checkpoint)
        config = describe(path, stated, family)
        return config._replace(spec=_with_whole_norms(config.spec))


def _find(path: Path, metadata: Mapping[str, Any]) -> tuple[str, Family]:
    """Return the architecture's name, and the family that runs it."""
    architecture = str(metadata.get("general.architecture"))
    if (parts := metadata.get("split.count", 1)) not in (0, 1):
        raise UnsupportedModelError(
            f"{path} is one of {parts} parts of a model: join them with llama.cpp's llama-gguf-split --merge"
        )
    if architecture not in _ARCHITECTURES:
        raise UnsupportedModelError(
            f"{path} has general.architecture={architecture!r}; supported in GGUF files are language models of "
            f"{', '.join(_ARCHITECTURES)}"
        )
    name = _ARCHITECTURES[architecture]
    # Files with Mistral's models call them Llama, which has no window.
    windowed = architecture == "llama" and metadata.get("llama.attention.sliding_window")
    return architecture, FAMILIES["MistralForCausalLM" if windowed else name]


def _check_kinds(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.kind not in READABLE:
            raise UnsupportedModelError(
                f"{path} stores {name} as {tensor.kind}, which grating does not read: take a file of the model in "
                f"{', '.join(sorted(READABLE))}, such as one named Q8_0, Q4_K_M or Q4_0"
            )


def _stated(path: Path, header: GgufHeader, architecture: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the fields of a ``config.json`` that the metadata stand for."""
    metadata = header.metadata
    own = {
        key.removeprefix(f"{architecture}."): _one(key, value)
        for key, value in metadata.items()
        if key.startswith(f"{architecture}.")
    }
    stated = {field: own[key] for key, field in _FIELDS.items() if key in own}
    if lacks := [key for key in list(_FIELDS)[:5] if key not in own]:
        raise ModelNotFoundError(f"{path} lacks {architecture}.{lacks[0]} in its metadata")
    if (table := header.tensors.get("token_embd.weight")) is None:
        raise ModelNotFoundError(f"the weights in {path} lack token_embd.weight, the embedding table")
    heads = stated["num_attention_heads"]
    stated.setdefault("num_key_value_heads", heads)
    stated.setdefault("rope_theta", _THETA)
    if isinstance(heads, int) and isinstance(stated["hidden_size"], int) and heads > 0:
        stated.setdefault("head_dim", stated["hidden_size"] // heads)
    stated["vocab_size"] = table.shape[0]
    stated["tie_word_embeddings"] = "output.weight" not in header.tensors
    stated["attention_bias"] = "blk.0.attn_output.bias" in header.tensors
    stated["mlp_bias"] = "blk.0.ffn_down.bias" in header.tensors
    stated["eos_token_id"] = [metadata[key] for end in _ENDS if (key := f"tokenizer.ggml.{end}") in metadata]
    size = stated.get("head_dim")
    for key, field in (
        ("rope.dimension_count", "partial_rotary_factor"),
        ("attention.value_length", "v_head_dim"),
    ):
        if own.get(key, size) != size:
            raise UnsupportedModelError(
                f"{path} has {architecture}.{key}={own[key]} for heads of {size} entries: grating does not "
                f"implement this ({field})"
            )
    return stated | _positions(own, header.tensors, checkpoint) | _own_fields(architecture, own, stated)


def _one(key: str, value: Any) -> Any:
    """Return the one value that a list has for every layer; a list of others as it is."""
    if isinstance(value, list) and value and all(item == value[0] for item in value):
        return value[0]
    return value


def _own_fields(architecture: str, own: Mapping[str, Any], stated: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that only some architectures have."""
    found: dict[str, Any] = {}
    size = stated.get("head_dim")
    if architecture == "granite" and not own.get("attention.scale") and size:
        found["attention_multiplier"] = size**-0.5
    if architecture in _LARGEST_GEMMA:
        share = stated["num_hidden_layers"] == _LARGEST_GEMMA[architecture]
        found["query_pre_attn_scalar"] = stated["hidden_size"] // stated["num_attention_heads"] if share else size
        if scale := own.get("attention.scale"):
            found |= {"query_pre_attn_scalar": round(scale**-2), "attention_multiplier": None}
    pattern = own.get("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        found["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in pattern]
    elif isinstance(pattern, int) and architecture == "gemma3":
        found["sliding_window_pattern"] = pattern
    return found


def _positions(
    own: Mapping[str, Any], tensors: Mapping[str, StoredTensor], checkpoint: Checkpoint
) -> dict[str, Any]:
    """Return the fields of rotary positions that are not plain."""
    kind, factor = own.get("rope.scaling.type", "none"), own.get("rope.scaling.factor", 0)
    factors = {
        name: _numbers(tensors[f"{stored}.weight"], checkpoint)
        for name, stored in (
            ("short_factor", "rope_factors_short"),
            ("long_factor", "rope_factors_long"),
            ("both", "rope_freqs"),
        )
        if f"{stored}.weight" in tensors
    }
    scaling: dict[str, Any] = {}
    if (both := factors.pop("both", None)) is not None:
        # The factors of Llama 3, which hold for any length.
        scaling = {"rope_type": "longrope", "short_factor": both, "long_factor": both, "attention_factor": 1.0}
        return {"rope_scaling": scaling}
    if factors:
        scaling = {"rope_type": "longrope", **factors}
        if own.get("rope.scaling.attn_factor"):
            scaling["attention_factor"] = own["rope.scaling.attn_factor"]
    elif kind != "none" and factor not in (0, 1):
        scaling = {"rope_type": kind, "factor": factor}
        for name in ("beta_fast", "beta_slow"):
            if own.get(f"rope.scaling.yarn_{name}"):
                scaling[name] = own[f"rope.scaling.yarn_{name}"]
        if own.get("rope.scaling.yarn_log_multiplier"):
            scaling["mixed_b"] = own["rope.scaling.yarn_log_multiplier"]  # refused, as no family knows it
    first = own.get("rope.scaling.original_context_length")
    if scaling and first:
        return {"rope_scaling": scaling | {"original_max_position_embeddings": first}} | (
            {"original_max_position_embeddings": first} if factors else {}
        )
    return {"rope_scaling": scaling} if scaling else {}


def _numbers(tensor: StoredTensor, checkpoint: Checkpoint) -> list[float]:
    """Return the numbers of a small tensor."""
    if tensor.kind not in FLOATS or tensor.end - tensor.start > 1 << 20:
        raise UnsupportedModelError(f"{tensor.path} stores {tensor.name} as {tensor.kind} {list(tensor.shape)}")
    data = torch.empty(tensor.end - tensor.start, dtype=torch.uint8)
    checkpoint.read(tensor, tensor.start, data)
    numbers: list[float] = data.view(FLOATS[tensor.kind]).double().tolist()
    return numbers


def _with_whole_norms(spec: ModelSpec) -> ModelSpec:
    """Return a spec whose norms add nothing to their weights, because such a number is in the stored weights."""

    def whole(norm: Norm) -> Norm:
        return replace(norm, offset=0.0)

    layers = tuple(replace(layer, norm=whole(layer.norm)) for layer in spec.layers)
    return replace(spec, norm=whole(spec.norm), layers=layers)


def gguf_tensors(tensors: Mapping[str, StoredTensor], config: Configuration) -> dict[str, StoredTensor]:
    """Return the tensors of a GGUF file by the names that they have in a checkpoint of the family."""
    family, layer = config.family, config.spec.layers[0]
    behind = {_LAYER[roles]: name for name, roles in family.layer.items()}
    around = {_AROUND[role]: name for name, role in {**family.outside, **family.head}.items()}
    in_pairs = family.architecture in _IN_PAIRS
    heads = {"attn_q": layer.heads, "attn_k": layer.key_heads} if in_pairs else {}
    found = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if module.startswith("blk."):
            _, number, own = (*module.split(".", 2), "")[:3]
            module = f"{family.layers}.{number}.{behind.get(own, own)}"
            tensor = replace(tensor, interleaved=heads.get(own, 0))
        else:
            module = around.get(module, module)
        found[f"{module}.{kind}"] = tensor
    return found
