"""GGUF files of tiny models, as llama.cpp's converter writes them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import PreTrainedModel

ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}
INTERLEAVED = ("llama", "mistral", "granite")
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
AROUND = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
# A tokenizer of bytes, in the alphabet of GPT-2, and some words.
WORDS = ["yes", "no", "Ġyes", "Ġno"]
SPECIALS = ["<|endoftext|>", "</s>", "<unk>"]


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    kind: Kind | Callable[[str], Kind],
    *,
    tokenizer: bool = False,
    changed: dict[str, Any] | None = None,
) -> Path:
    """Write a language model, and put into it the weights that the file stands for.

    Args:
        path: The file.
        model: The model, float32.
        kind: How matrices are stored whose rows are whole blocks of this kind, or a function of their names.
        tokenizer: Whether the file has a tokenizer of bytes.
        changed: Metadata to add or to change.
    """
    config = model.config
    architecture = ARCHITECTURES.get(config.model_type, config.model_type)
    file = gguf.GGUFWriter(path, architecture)
    for add, value in _metadata(config, architecture):
        getattr(file, f"add_{add}")(value)
    if tokenizer:
        _add_tokenizer(file, config.vocab_size)
    for key, value in (changed or {}).items():
        file.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, factors in _factors(config).items():
        file.add_tensor(f"{name}.weight", np.array(factors, dtype=np.float32))
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stored = _name(name, architecture)
        data = weight.numpy()
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        turned = heads.get(stored.split(".")[-2], 0) if config.model_type in INTERLEAVED else 0
        if turned:
            data = data.reshape(turned, 2, -1, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
        if architecture.startswith("gemma") and "norm" in stored:
            data = data + 1
        wanted = kind if isinstance(kind, Kind) else kind(stored)
        data, back, raw = _stored(data, wanted)
        file.add_tensor(stored, data, raw_dtype=raw)
        if turned:
            back = back.reshape(turned, -1, 2, *back.shape[1:]).swapaxes(1, 2).reshape(back.shape)
        if architecture.startswith("gemma") and "norm" in stored:
            back = back - 1
        with torch.no_grad():
            weight.copy_(torch.from_numpy(back))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


def _stored(data: np.ndarray, kind: Kind) -> tuple[np.ndarray, np.ndarray, Kind]:
    """What is written, the numbers that it stands for, and its kind."""
    if data.ndim < 2 or kind == Kind.F32:
        return data, data, Kind.F32
    block = gguf.GGML_QUANT_SIZES[kind][0]
    if data.shape[-1] % block or kind == Kind.F16:
        data = data.astype(np.float16)
        return data, data.astype(np.float32), Kind.F16
    packed = k_blocks(data, kind) if block == 256 else gguf.quants.quantize(data, kind)
    return packed, gguf.quants.dequantize(packed, kind), kind


def k_blocks(data: np.ndarray, kind: Kind) -> np.ndarray:
    """Blocks of 256 entries of about the size of the data: the package gguf reads such blocks but writes none."""
    size = gguf.GGML_QUANT_SIZES[kind][1]
    chance = np.random.default_rng(data.size)
    blocks = chance.integers(0, 256, size=(data.size // 256, size), dtype=np.uint8)
    half, eight, small = (
        np.full((len(blocks), 1), size, dtype=np.float16).view(np.uint8) for size in (2e-4, 16e-4, 3e-5)
    )
    if kind == Kind.Q6_K:
        blocks[:, 208:] = small
    else:
        blocks[:, :2] = half
        blocks[:, 2:4] = eight if kind == Kind.Q4_K else half
    return blocks.reshape(*data.shape[:-1], -1)


def _name(name: str, architecture: str) -> str:
    module, _, kind = name.rpartition(".")
    if module in AROUND:
        return f"{AROUND[module]}.{kind}"
    _, _, number, own = module.split(".", 3)
    names = LAYER | (GEMMA if architecture in ("gemma2", "gemma3") else {})
    return f"blk.{number}.{names[own]}.{kind}"


def _metadata(config: Any, architecture: str) -> list[tuple[str, Any]]:
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    ropes = config.rope_parameters
    full = ropes.get("full_attention", ropes)
    found = [
        ("block_count", config.num_hidden_layers),
        ("context_length", config.max_position_embeddings),
        ("embedding_length", config.hidden_size),
        ("feed_forward_length", config.intermediate_size),
        ("head_count", config.num_attention_heads),
        ("head_count_kv", config.num_key_value_heads),
        ("key_length", size),
        ("value_length", size),
        ("rope_dimension_count", size),
        ("layer_norm_rms_eps", config.rms_norm_eps),
        ("rope_freq_base", full["rope_theta"]),
    ]
    for field, add in (
        ("sliding_window", "sliding_window"),
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
        ("embedding_multiplier", "embedding_scale"),
        ("attention_multiplier", "attention_scale"),
        ("residual_multiplier", "residual_scale"),
        ("logits_scaling", "logit_scale"),
    ):
        if getattr(config, field, None) is not None:
            found.append((add, getattr(config, field)))
    if hasattr(config, "query_pre_attn_scalar"):
        found.append(("attention_scale", config.query_pre_attn_scalar**-0.5))
    if architecture == "gemma3":
        found.append(("rope_freq_base_swa", ropes["sliding_attention"]["rope_theta"]))
        found.append(("sliding_window_pattern", [kind == "sliding_attention" for kind in config.layer_types]))
    if full["rope_type"] in ("linear", "yarn"):
        found.append(("rope_scaling_type", gguf.RopeScalingType(full["rope_type"])))
        found.append(("rope_scaling_factor", full["factor"]))
    if full.get("original_max_position_embeddings"):
        found.append(("rope_scaling_orig_ctx_len", full["original_max_position_embeddings"]))
    return found


def _factors(config: Any) -> dict[str, list[float]]:
    """Tensors of rotary positions, which are not weights of the model."""
    ropes = config.rope_parameters
    if ropes.get("rope_type") == "longrope":
        return {"rope_factors_long": ropes["long_factor"], "rope_factors_short": ropes["short_factor"]}
    if ropes.get("rope_type") == "llama3":
        # Of the paper's rule, which the converter computes as well.
        size = config.head_dim
        plain = ropes["rope_theta"] ** -(np.arange(0, size, 2) / size)
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        turned, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        return {"rope_freqs": (plain / turned.numpy()).tolist()}
    return {}


def _add_tokenizer(file: gguf.GGUFWriter, count: int) -> None:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + place) for place in range(len(others))]
    merges = ["y e", "ye s", "n o", "Ġ yes", "Ġ no"]
    tokens = [*SPECIALS, *alphabet, "ye", *WORDS]
    tokens += [f"<unused{number}>" for number in range(count - len(tokens))]
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("gpt-2")
    file.add_token_list(tokens)
    file.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    file.add_token_merges(merges)
    file.add_bos_token_id(0)
    file.add_eos_token_id(1)
    file.add_unk_token_id(2)
