"""These checks compare a configuration with what is implemented and what is stored, before weights are read."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from grating_core.errors import ModelNotFoundError, UnsupportedModelError
from grating_core.kernels.activations import ACTIVATIONS
from grating_core.layers.spec import Role
from grating_core.memory.header import StoredTensor
from grating_core.models.family import Configuration, Family, Fields
from grating_core.models.layout import layer_names, outside_names
from grating_core.models.rope import FULL, NEEDS, SLIDING, by_type, read_ropes

_LARGEST = 2**31
_MOST_LAYERS = 10_000
_WHOLE = {
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "head_dim", "max_position_embeddings", "type_vocab_size", "local_attention",
    "start_layer", "embedding_size", "sliding_window_pattern",
}  # fmt: skip
_REAL = {
    "layer_norm_eps", "rms_norm_eps", "norm_eps", "rope_theta", "global_rope_theta", "local_rope_theta", "factor",
    "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "scale_emb", "scale_depth",
    "embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling", "temperature",
    "rope_local_base_freq",
}  # fmt: skip
_ROPE = ("rope_parameters", "rope_scaling")
_ROPE_NUMBERS = {
    "attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "low_freq_factor",
    "high_freq_factor", "original_max_position_embeddings",
}  # fmt: skip
_ACTIVATIONS = {"hidden_act", "hidden_activation", "classifier_activation", "pooler_hidden_act"}

# What a field must be, by its name, or else by the type of its default.
_KINDS: dict[str, tuple[Any, str]] = {
    "eos_token_id": (int | list, "a token's number, or a list of them"),
    "layer_types": (list, "a list of texts"),
    "problem_type": (str, "a text"),
    "pos_att_type": (str | list, "a text, or a list of texts"),
    "final_logit_softcapping": (int | float, "a number"),
    **dict.fromkeys(("id2label", *_ROPE), (dict, "an object")),
}
_ITEMS: dict[str, type] = {"eos_token_id": int, "layer_types": str, "pos_att_type": str}  # of lists
_KINDS_OF_DEFAULTS: dict[type, tuple[Any, str]] = {
    bool: (bool, "true or false"),
    str: (str, "a text"),
    int: (int, "a whole number"),
    float: (int | float, "a number"),
    type(None): (int, "a whole number"),
}
# With null these have a meaning of their own; the other fields may be null only if that is their default.
_NULL = {
    "num_key_value_heads", "sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "eos_token_id",
    "share_att_key",
}  # fmt: skip

# The fields that say how many rows the weight of a role has, or how many heads.
_ROWS: dict[Any, str] = {
    "table": "vocab_size", "positions": "max_position_embeddings", "types": "type_vocab_size",
    "gate": "intermediate_size", "up": "intermediate_size",
}  # fmt: skip
_TABLES = ("table", "positions", "types")
_HEADS: dict[Any, str] = {"query": "num_attention_heads", "key": "num_key_value_heads"}

# What heads can read, by the field that says it.
_POOLINGS = {"classifier_pooling": ("cls", "mean"), "pooling": ("avg", "cls", "last")}

# These fields must have this value, if a configuration has them.
_CAUSAL = {"is_causal": True, "use_bidirectional_attention": False}
_BOTH_WAYS = {"is_decoder": False, "add_cross_attention": False}

# These fields change the mathematics, except with None, False, 0 and the values here. A family that does not know
# such a field would compute other scores.
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
            "use_parallel_residual", "no_rope_layer_interval", "attn_temperature_tuning", "conv_kernel_size",
        ),
        (),
    ),
}  # fmt: skip

# Names of tensors in quantised layers, from AWQ, GPTQ, bitsandbytes, compressed-tensors and FP8 checkpoints.
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|SCB|absmax|nested_absmax|quant_map|nested_quant_map|quant_state\..*|weight_packed|"
    r"weight_scale|weight_scale_inv|weight_zero_point|weight_shape|input_scale)$"
)


def check_values(path: Path, stated: Fields, family: Family) -> None:
    """Refuse values of a ``config.json`` that no model has.

    Raises:
        ModelNotFoundError: There is such a value; the message names file, field and value.
    """
    for name, value in _numbers(stated):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        largest = _MOST_LAYERS if name == "num_hidden_layers" else _LARGEST
        least = 0 if name == "type_vocab_size" else 1
        if name in _WHOLE and not (number and isinstance(value, int) and least <= value <= largest):
            raise _senseless(path, family.field(name), value, f"a whole number, {least} or more")
        if name in _REAL and not (number and 0 < value < math.inf):
            raise _senseless(path, name, value, "a number above 0")
        if name in _ROPE_NUMBERS and not number:
            raise _senseless(path, name, value, "a number")
        if isinstance(value, float) and not math.isfinite(value):
            raise ModelNotFoundError(f"{path} has {family.field(name)}={value}, which is no number")
    for name, default in family.defaults.items():
        value = stated.get(name, default)
        kind, wanted = _KINDS.get(name) or _KINDS_OF_DEFAULTS[type(default)]
        null = value is None and (default is None or name in _NULL)
        items = value if isinstance(value, list) else ()
        if not (null or _is(value, kind)) or not all(_is(item, _ITEMS[name]) for item in items):
            raise _senseless(path, family.field(name), value, wanted)


def _is(value: object, kind: Any) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _numbers(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield name and value of each number that is given, the numbers of rotary positions included."""
    for name, value in fields.items():
        if name in _ROPE and isinstance(value, dict):
            yield from _numbers(value)
            for part in value.values():  # some models have rotary numbers for each type of layer
                yield from _numbers(part) if isinstance(part, dict) else ()
        elif value is not None:
            yield name, value


def check_implemented(path: Path, stated: Fields, fields: Fields, family: Family) -> None:
    """Refuse a model whose mathematics grating does not implement.

    Args:
        path: The ``config.json``.
        stated: What it says.
        fields: The fields that the family knows, completed by its defaults.
        family: The model's family.

    Raises:
        ModelNotFoundError: The types of layers are not those of the layers.
        UnsupportedModelError: The model is such a one; the message names file, field and value.
    """
    for name, neutral in _NEUTRAL.items():
        value = stated.get(name)
        off = name == "sliding_window" and stated.get("use_sliding_window") is False
        if name not in family.defaults and not off and value not in (None, False, 0, *neutral):
            raise _unsupported(path, name, value)
    for name, only in {**(_CAUSAL if family.causal else _BOTH_WAYS), **family.fixed}.items():
        if (value := stated.get(name)) not in (None, only(fields) if callable(only) else only):
            raise _unsupported(path, name, value)
    for name in _ACTIVATIONS & fields.keys():
        if fields[name] not in ACTIVATIONS:
            raise _unsupported(path, family.field(name), fields[name])
    _check_layer_types(path, stated, fields)
    if "rope_parameters" in fields:
        _check_ropes(path, fields, family)
    for name, poolings in _POOLINGS.items():
        if name in fields and fields[name] not in poolings:
            raise _unsupported(path, name, fields[name])


def _check_layer_types(path: Path, stated: Fields, fields: Fields) -> None:
    types = stated.get("layer_types")
    if types is None:
        return
    if others := set(map(str, types)) - ({FULL, SLIDING} if "layer_types" in fields else {FULL}):
        raise _unsupported(path, "layer_types", sorted(others))
    if len(types) != fields["num_hidden_layers"]:
        raise ModelNotFoundError(
            f"{path} has layer_types of {len(types)} layers, and num_hidden_layers={fields['num_hidden_layers']}"
        )


def _check_ropes(path: Path, fields: Fields, family: Family) -> None:
    stated = fields["rope_parameters"] or {}
    if by_type(fields) and stated and not {FULL, SLIDING} & stated.keys():
        raise _unsupported(path, "rope_parameters", stated)
    for rope in read_ropes(fields).values():
        kind = rope["rope_type"]
        if not isinstance(kind, str) or kind not in family.ropes:
            raise _unsupported(path, "rope_type", kind)
        if lacks := [name for name in NEEDS[kind] if name not in rope]:
            raise ModelNotFoundError(f"{path} has rope_type={kind!r} without {lacks[0]}")
        for name, neutral in (("partial_rotary_factor", 1), ("mixed_b", None)):
            if (value := rope.get(name)) not in (None, neutral):
                raise _unsupported(path, name, value)
        if any(isinstance(value, dict) for value in rope.values()):
            raise _unsupported(path, "rope_parameters", stated)


def _senseless(path: Path, name: str, value: object, wanted: str) -> ModelNotFoundError:
    return ModelNotFoundError(f"{path} has {name}={_shown(value)}, which must be {wanted}")


def _unsupported(path: Path, name: str, value: object) -> UnsupportedModelError:
    reason = "grating does not implement this, and without it the scores would be wrong"
    return UnsupportedModelError(f"{path} has {name}={_shown(value)}: {reason}")


def check_not_quantised(tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse quantised weights.

    Args:
        tensors: The stored tensors, by name.

    Raises:
        UnsupportedModelError: There are such weights; the message names the first.
    """
    for name, tensor in tensors.items():
        if _QUANTISED.search(name):
            raise UnsupportedModelError(
                f"{tensor.path} stores {name}: its weights are quantised (AWQ, GPTQ, bitsandbytes or similar), "
                f"which is not supported. Take the checkpoint it was made from, in float32, float16 or bfloat16"
            )


def check_stored(path: Path, configuration: Configuration, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse a configuration that belongs to another model than the weights.

    Args:
        path: The ``config.json``.
        configuration: What it says.
        tensors: The stored tensors, by name.

    Raises:
        ModelNotFoundError: The configuration is such a one; the message names file, field and value.
        UnsupportedModelError: The weights are quantised.
    """
    check_not_quantised(tensors)
    fields, spec, family = configuration
    layer = re.compile(rf"{re.escape(family.layers)}\.(\d{{1,9}})\.")
    numbers = [int(found[1]) for name in tensors if (found := layer.match(name))]
    if numbers and max(numbers) + 1 != spec.depth:
        raise ModelNotFoundError(
            f"{path} has {family.field('num_hidden_layers')}={spec.depth}, but its weights in {path.parent} have "
            f"{max(numbers) + 1:,} layers"
        )
    names = {f"{name}.weight": role for name, role in family.outside.items()} | {
        f"{family.layers}.0.{name}.weight": role for name, role in family.layer.items()
    }
    for name, wanted in (outside_names(family, spec) | layer_names(family, spec.layers[0], 1)).items():
        for axis, size in enumerate(wanted):
            said = _said(configuration, names.get(name), axis)
            if said and name in tensors and tensors[name].shape[axis : axis + 1] != (size,):
                raise ModelNotFoundError(
                    f"{path} has {said}, which does not fit its weights: {tensors[name].path.name} stores {name} "
                    f"as {list(tensors[name].shape)}"
                )
    for name, role in family.head.items():
        weight = tensors.get(f"{name}.weight")
        unnamed = fields.get("num_labels", 1) != 1 and fields["id2label"] is None
        if role == "classifier" and unnamed and weight is not None and weight.shape[:1] == (1,):
            raise ModelNotFoundError(
                f"{path} describes {fields['num_labels']} labels (without num_labels and id2label there are two), "
                f'and {weight.path.name} stores {name} of one label: write "num_labels": 1 into it'
            )
    if spec.first_head > spec.depth:
        raise ModelNotFoundError(
            f"{path} has start_layer={spec.first_head}, but num_hidden_layers={spec.depth}: no layer has a head"
        )
    if spec.window < 8:
        raise ModelNotFoundError(
            f"{path} has max_position_embeddings={fields['max_position_embeddings']}, which leaves no room for a "
            f"pair"
        )


def _said(configuration: Configuration, role: Role | tuple[Role, ...] | None, axis: int) -> str:
    """Return the fields that say the size of an axis of a role's weight, with their values; empty if none do."""
    fields, spec, family = configuration
    if axis == 0 and role in _HEADS and _HEADS[role] in fields:
        return f"{family.field(_HEADS[role])}={fields[_HEADS[role]]} of head_dim={spec.layers[0].head_size}"
    if role not in _ROWS and role not in _HEADS:
        return ""
    wide = "embedding_size" if role in _TABLES and "embedding_size" in fields else "hidden_size"
    name = _ROWS.get(role, "") if axis == 0 else wide
    return f"{family.field(name)}={fields[name]}" if name in fields else ""


def check_taken(family: Family, stored: Mapping[str, StoredTensor], wanted: Container[str]) -> None:
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


def check_complete(directory: Path, family: Family, stored: Container[str], wanted: Iterable[str]) -> None:
    """Refuse weights that are not all there.

    Raises:
        ModelNotFoundError: Tensors are missing; the message names some, and says if they are the head.
    """
    missing = [name for name in wanted if name not in stored]
    if not missing:
        return
    heads = tuple(f"{name}." for name in family.head if "{" not in name)
    if heads and all(name.startswith(heads) for name in missing):
        raise ModelNotFoundError(
            f"the weights in {directory} lack {missing[0]}, the head that gives the score: they are those of a "
            f"base model or of one that makes embeddings. Take a reranker, or the files that it was saved with"
        )
    raise ModelNotFoundError(
        f"the weights in {directory} lack {len(missing)} tensors that {family.architecture} needs: "
        f"{', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}"
    )


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
