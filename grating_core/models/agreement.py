"""These checks compare a configuration with what grating implements and what is stored, before building."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from grating_core.errors import ModelNotFoundError, UnsupportedModelError
from grating_core.memory.header import StoredTensor
from grating_core.models.families import Config, Family

_LARGEST = 2**31
_MOST_LAYERS = 10_000
_WHOLE = {
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "head_dim", "max_position_embeddings", "type_vocab_size", "local_attention",
    "start_layer",
}  # fmt: skip
_REAL = {
    "layer_norm_eps", "rms_norm_eps", "norm_eps", "rope_theta", "global_rope_theta", "local_rope_theta", "factor",
    "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "scale_emb", "scale_depth",
    "embedding_multiplier", "residual_multiplier", "attention_multiplier",
}  # fmt: skip
_ROPE = ("rope_parameters", "rope_scaling")
_FULL = "full_attention"
_LAYER_TYPES = {_FULL, "sliding_attention"}

# These fields change the mathematics, except with None, False, 0 and the values here. A transformers class that
# does not know a field ignores it, and computes other scores.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("absolute",),
    "pruned_heads": ({},),
    "no_rope_layers": ([],),
    **dict.fromkeys(
        (
            "embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling", "scale_emb",
            "scale_depth", "partial_rotary_factor", "rotary_pct", "num_experts", "num_local_experts",
            "n_routed_experts",
        ),
        (1,),
    ),
    **dict.fromkeys(
        (
            "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "sliding_window",
            "alibi", "use_alibi", "qk_norm", "use_qk_norm", "qk_layernorm", "clip_qkv", "parallel_attn",
            "use_parallel_residual", "no_rope_layer_interval", "attn_temperature_tuning",
        ),
        (),
    ),
}  # fmt: skip

# Names of tensors in quantised layers, from AWQ, GPTQ, bitsandbytes, compressed-tensors and FP8 checkpoints.
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|SCB|absmax|nested_absmax|quant_map|nested_quant_map|quant_state\..*|weight_packed|"
    r"weight_scale|weight_scale_inv|weight_zero_point|weight_shape|input_scale)$"
)


def check_numbers(path: Path, fields: Mapping[str, Any]) -> None:
    """Refuse numbers of a ``config.json`` that no model has.

    Raises:
        ModelNotFoundError: There is such a number; the message names file, field and value.
    """
    for name, value in _numbers(fields):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        largest = _MOST_LAYERS if name == "num_hidden_layers" else _LARGEST
        if name in _WHOLE and not (number and isinstance(value, int) and 1 <= value <= largest):
            raise ModelNotFoundError(f"{path} has {name}={_shown(value)}, which must be a whole number, 1 or more")
        if name in _REAL and not (number and 0 < value < math.inf):
            raise ModelNotFoundError(f"{path} has {name}={_shown(value)}, which must be a number above 0")
        if isinstance(value, float) and not math.isfinite(value):
            raise ModelNotFoundError(f"{path} has {name}={value}, which is no number")


def _numbers(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield name and value of each number that is given, the numbers of rotary positions included."""
    for name, value in fields.items():
        if name in _ROPE and isinstance(value, dict):
            yield from _numbers(value)
            for part in value.values():  # some models have rotary numbers for each type of layer
                yield from _numbers(part) if isinstance(part, dict) else ()
        elif value is not None:
            yield name, value


def check_implemented(path: Path, fields: Mapping[str, Any], config: Config, family: Family) -> None:
    """Refuse a model whose mathematics grating does not implement.

    Raises:
        UnsupportedModelError: The model is such a one; the message names file, field and value.
    """
    known = family.module_class.config_class()
    for name, neutral in _NEUTRAL.items():
        value = fields.get(name)
        ignored = not hasattr(known, name) and not (family.read_config and name.startswith("scale_"))
        off = name == "sliding_window" and fields.get("use_sliding_window") is False
        if ignored and not off and value not in (None, False, 0, *neutral):
            raise _unsupported(path, name, value)
    if not family.causal:
        for name in ("is_decoder", "add_cross_attention"):
            if getattr(config, name, False):
                raise _unsupported(path, name, True)
    else:
        if getattr(config, "use_bidirectional_attention", False):
            raise _unsupported(path, "use_bidirectional_attention", True, "only causal decoders are supported")
        if fields.get("is_causal") is False:
            raise _unsupported(path, "is_causal", False, "only causal decoders are supported")
    _check_layer_types(path, fields, config)
    for name in _ROPE:
        rope = fields.get(name)
        parts = [rope, *rope.values()] if isinstance(rope, dict) else []
        if any(
            isinstance(part, dict) and "longrope" in (part.get("rope_type"), part.get("type")) for part in parts
        ):
            raise _unsupported(path, "rope_type", "longrope", "with it a score depends on the other documents")
    if (pooling := getattr(config, "classifier_pooling", "cls")) not in ("cls", "mean"):
        raise _unsupported(path, "classifier_pooling", pooling)
    if family.head_module is None and config.num_labels != 1:
        raise UnsupportedModelError(
            f"{path} describes {config.num_labels} labels; a reranker has one relevance score. "
            f"Classifiers with several labels cannot rank"
        )


def _check_layer_types(path: Path, fields: Mapping[str, Any], config: Config) -> None:
    stated, known = fields.get("layer_types"), getattr(config, "layer_types", None)
    if stated and known is None and set(map(str, stated)) != {_FULL}:
        raise _unsupported(path, "layer_types", stated)
    if known is None:
        return
    if others := set(known) - _LAYER_TYPES:
        raise _unsupported(path, "layer_types", sorted(map(str, others)))
    if len(known) != config.num_hidden_layers:
        raise ModelNotFoundError(
            f"{path} has layer_types of {len(known)} layers, and num_hidden_layers={config.num_hidden_layers}"
        )
    window = getattr(config, "sliding_window", 1)
    if set(known) != {_FULL} and not (isinstance(window, int) and window >= 1):
        raise ModelNotFoundError(f"{path} has sliding_window={window!r}, which must be a whole number, 1 or more")


def _unsupported(path: Path, name: str, value: object, why: str = "") -> UnsupportedModelError:
    reason = why or "grating does not implement this, and without it the scores would be wrong"
    return UnsupportedModelError(f"{path} has {name}={_shown(value)}: {reason}")


def check_stored(path: Path, config: Config, family: Family, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse a configuration that belongs to another model than the weights.

    Args:
        path: The ``config.json``.
        config: The configuration.
        family: The model's family.
        tensors: The stored tensors, by name.

    Raises:
        ModelNotFoundError: The configuration is such a one; the message names file, field and value.
        UnsupportedModelError: The weights are quantised.
    """
    for name, tensor in tensors.items():
        if _QUANTISED.search(name):
            raise UnsupportedModelError(
                f"{tensor.path} stores {name}: its weights are quantised (AWQ, GPTQ, bitsandbytes or similar), "
                f"which is not supported. Take the checkpoint it was made from, in float32, float16 or bfloat16"
            )
    layer = re.compile(rf"{re.escape(family.layers)}\.(\d{{1,9}})\.")
    numbers = [int(found[1]) for name in tensors if (found := layer.match(name))]
    if numbers and max(numbers) + 1 != config.num_hidden_layers:
        raise ModelNotFoundError(
            f"{path} has num_hidden_layers={config.num_hidden_layers}, but its weights in {path.parent} have "
            f"{max(numbers) + 1:,} layers"
        )
    for name, axis, fields, wanted in _sizes(config, family):
        if name in tensors and tensors[name].shape[axis : axis + 1] != (wanted,):
            raise ModelNotFoundError(
                f"{path} has {fields}, which does not fit its weights: {tensors[name].path.name} stores {name} as "
                f"{list(tensors[name].shape)}"
            )
    window = family.window(config)
    if window < 8:
        raise ModelNotFoundError(
            f"{path} has max_position_embeddings={config.max_position_embeddings}, which leaves no room for a pair"
        )


def _sizes(config: Config, family: Family) -> Iterator[tuple[str, int, str, int]]:
    """Yield tensors whose sizes the configuration states: name, axis, the fields, and the size."""
    embeddings = family.embedding.rpartition(".")[0]
    first = f"{family.layers}.0"
    for name, axis, field in (
        (f"{family.embedding}.weight", 0, "vocab_size"),
        (f"{family.embedding}.weight", 1, "hidden_size"),
        (f"{embeddings}.position_embeddings.weight", 0, "max_position_embeddings"),
        (f"{embeddings}.token_type_embeddings.weight", 0, "type_vocab_size"),
        (f"{first}.intermediate.dense.weight", 0, "intermediate_size"),
        (f"{first}.mlp.gate_proj.weight", 0, "intermediate_size"),
    ):
        if (value := getattr(config, field, None)) is not None:
            yield name, axis, f"{field}={value}", value
    for matrix, field in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if (heads := getattr(config, field, None)) is not None:
            length = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            yield f"{first}.self_attn.{matrix}.weight", 0, f"{field}={heads} of head_dim={length}", heads * length


def check_taken(family: Family, stored: Mapping[str, StoredTensor], wanted: Mapping[str, Any]) -> None:
    """Refuse weights of a layer that grating would not use, such as the norms of a variant of the model.

    Raises:
        UnsupportedModelError: There are such weights; the message names the first.
    """
    for name, tensor in stored.items():
        if (
            name.startswith(f"{family.layers}.")
            and name not in wanted
            and not name.endswith(".rotary_emb.inv_freq")
        ):
            raise UnsupportedModelError(
                f"{tensor.path} stores {name}, which grating's {family.architecture} does not use: without it the "
                f"scores would be wrong"
            )


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
