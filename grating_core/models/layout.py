"""A layout says which tensors a model has, of which shapes, and what they are for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate, pairwise

from torch import Tensor

from grating_core.layers.spec import LayerSpec, Role
from grating_core.memory.header import StoredTensor
from grating_core.models.family import Family, ModelSpec

Shape = tuple[int, ...]

# Checkpoints that were converted from TensorFlow still use these names.
_LEGACY_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def modern_name(name: str) -> str:
    """Return the name that a tensor has in checkpoints of today."""
    for old, new in _LEGACY_NAMES.items():
        name = name.replace(old, new)
    return name


def layer_names(family: Family, spec: LayerSpec, number: int) -> dict[str, Shape]:
    """Return the names of the tensors of a layer, from 1, and their shapes."""
    found: dict[str, Shape] = {}
    for name, roles in layer_roles(family, spec):
        rows = sum(spec.shape(role)[0] for role in roles)
        module = f"{family.layers}.{number - 1}.{name}"
        found[f"{module}.weight"] = (rows, *spec.shape(roles[0])[1:])
        if roles[0] in spec.biased:
            found[f"{module}.bias"] = (rows,)
    return found


def layer_by_role(family: Family, spec: LayerSpec, number: int, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a layer, from 1, by role instead of by name. Nothing is copied.

    Tensors that are not in ``stored``, such as those of a pruned MLP, are left out.
    """
    found: dict[str, Tensor] = {}
    for name, roles in layer_roles(family, spec):
        ends = accumulate((spec.shape(role)[0] for role in roles), initial=0)
        for role, (start, end) in zip(roles, pairwise(ends), strict=True):
            for kind in ("weight", "bias"):
                if (tensor := stored.get(f"{family.layers}.{number - 1}.{name}.{kind}")) is not None:
                    found[f"{role}.{kind}"] = tensor[start:end]
    return found


def layer_roles(family: Family, spec: LayerSpec) -> Iterator[tuple[str, tuple[Role, ...]]]:
    """Yield the name of each linear map or norm that a layer has, behind the layer's number, and its roles."""
    for name, roles in family.layer.items():
        if roles not in spec.absent:
            yield name, (roles,) if isinstance(roles, str) else roles


def outside_names(family: Family, spec: ModelSpec) -> dict[str, Shape]:
    """Return the names of the tensors around the layers, and their shapes."""
    shapes: dict[Role, Shape] = {
        "table": (spec.vocabulary, spec.row),
        "positions": (spec.positions, spec.row),
        "types": (spec.types, spec.row),
        "embedding_norm": (spec.row,),
        "projection": (spec.width, spec.row),
        "relative": (spec.relative, spec.width),
    }
    found: dict[str, Shape] = {}
    for name, role in family.outside.items():
        if role in spec.absent:
            continue
        shape = shapes.get(role, (spec.width,))
        found[f"{name}.weight"] = shape
        if role in spec.biased:
            found[f"{name}.bias"] = shape[:1]
    return found


def outside_name(family: Family, role: Role) -> str:
    """Return the name of the weight of a role around the layers; empty if there is none."""
    return next((f"{name}.weight" for name, found in family.outside.items() if found == role), "")


def with_tied(stored: Mapping[str, StoredTensor], table: str, output: str) -> dict[str, StoredTensor]:
    """Return tensors of which the embedding table and the output embedding stand for each other, by name."""
    found = dict(stored)
    for name, other in ((output, table), (table, output)):
        if name in found:
            found.setdefault(other, found[name])
    return found


def outside_by_role(family: Family, spec: ModelSpec, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors around the layers by role instead of by name, as far as they are in ``stored``."""
    found: dict[str, Tensor] = {}
    for name in outside_names(family, spec).keys() & stored.keys():
        module, _, kind = name.rpartition(".")
        found[f"{family.outside[module]}.{kind}"] = stored[name]
    return found


def head_names(family: Family, spec: ModelSpec) -> dict[str, Shape]:
    """Return the names of the tensors of the head on disk, and their shapes."""
    return {f"{name}.{kind}": shape for name, _, kind, shape in _head_parts(family, spec)}


def head_by_role(family: Family, spec: ModelSpec, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the head by role instead of by name, as far as they are in ``stored``."""
    return {
        f"{role}.{kind}": stored[f"{name}.{kind}"]
        for name, role, kind, _ in _head_parts(family, spec)
        if f"{name}.{kind}" in stored
    }


def _head_parts(family: Family, spec: ModelSpec) -> Iterator[tuple[str, Role, str, Shape]]:
    """Yield name, role, kind and shape of each tensor of the head."""
    rows = {"dense": spec.width, "vocabulary": spec.vocabulary, "classifier": len(spec.labels)}
    own = {f"{module.role}/{part}": module.shape(part) for module in spec.modules for part in module.parts}
    for pattern, role in family.head.items():
        shape = own.get(role) or ((spec.width,) if role == "norm" else (rows.get(role, 1), spec.width))
        for number in range(spec.depth - spec.first_head + 1 if "{}" in pattern else 1):
            yield pattern.format(number), role.format(number), "weight", shape
            if role in spec.biased:
                yield pattern.format(number), role.format(number), "bias", shape[:1]
