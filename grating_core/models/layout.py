"""A layout says which tensors a model has, of which shapes, and what they are for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate, pairwise

from torch import Tensor

from grating_core.layers.linear import Weights
from grating_core.layers.spec import LayerSpec, Role
from grating_core.models.family import Family, ModelSpec

Shape = tuple[int, ...]


def layer_names(family: Family, spec: LayerSpec, number: int) -> dict[str, Shape]:
    """Return the names of the tensors of a layer, from 1, and their shapes."""
    found: dict[str, Shape] = {}
    for name, roles in _layer_roles(family, spec):
        rows = sum(spec.shape(role)[0] for role in roles)
        module = f"{family.layers}.{number - 1}.{name}"
        found[f"{module}.weight"] = (rows, *spec.shape(roles[0])[1:])
        if roles[0] in spec.biased:
            found[f"{module}.bias"] = (rows,)
    return found


def by_role(family: Family, spec: LayerSpec, number: int, stored: Mapping[str, Tensor]) -> Weights:
    """Return the tensors of a layer, from 1, by role instead of by name. Nothing is copied.

    Tensors that are not in ``stored``, such as those of a pruned MLP, are left out.
    """
    found: dict[str, Tensor] = {}
    for name, roles in _layer_roles(family, spec):
        ends = accumulate((spec.shape(role)[0] for role in roles), initial=0)
        for role, (start, end) in zip(roles, pairwise(ends), strict=True):
            for kind in ("weight", "bias"):
                if (tensor := stored.get(f"{family.layers}.{number - 1}.{name}.{kind}")) is not None:
                    found[f"{role}.{kind}"] = tensor[start:end]
    return found


def _layer_roles(family: Family, spec: LayerSpec) -> Iterator[tuple[str, tuple[Role, ...]]]:
    """Yield the name of each linear map or norm that a layer has, behind the layer's number, and its roles."""
    for name, roles in family.layer.items():
        if roles not in spec.absent:
            yield name, (roles,) if isinstance(roles, str) else roles


def outside_names(family: Family, spec: ModelSpec) -> dict[str, Shape]:
    """Return the names of the tensors around the layers, and their shapes."""
    rows = {"table": spec.vocabulary, "positions": spec.positions, "types": spec.types}
    found: dict[str, Shape] = {}
    for name, role in family.outside.items():
        found[f"{name}.weight"] = (rows[role], spec.width) if role in rows else (spec.width,)
        if role in spec.biased:
            found[f"{name}.bias"] = (spec.width,)
    return found
