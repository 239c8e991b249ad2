"""A family says what the tensors of an architecture are for, and reads its configurations."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor

from grating_core.layers.linear import Weights
from grating_core.layers.spec import LayerSpec, Norm, Role
from grating_core.models.labels import ONE, Labels

Fields = Mapping[str, Any]
"""The fields of a ``config.json``, completed by the family's defaults."""

Pooling = Literal["first", "last", "mean"]


@dataclass(frozen=True)
class HeadModule:
    """A module is a step of a head that is made of several, as sentence-transformers stores it.

    Attributes:
        role: The module's role, which is the name of its folder.
        parts: The linear maps and norms that it has weights for: ``"linear"``, ``"residual"``, ``"norm"``.
        biased: The parts that have a bias.
        rows: Number of features that it gives; None for as many as it reads.
        columns: Number of features that it reads; None for any number.
        function: Name of the activation behind the linear map, see :data:`grating_core.models.heads.FUNCTIONS`.
        residual: Whether what it reads is added to what it gives.
        source: The name of what it reads; pooling gives ``"sentence_embedding"``.
        target: The name of what it gives; ``"scores"`` are the model's.
    """

    role: Role
    parts: tuple[str, ...]
    biased: tuple[str, ...]
    rows: int | None
    columns: int | None
    function: str
    residual: bool
    source: str
    target: str

    def shape(self, part: str) -> tuple[int, ...]:
        """Return the shape of a part's weight."""
        rows, columns = self.rows or 0, self.columns or 0
        return (columns,) if part == "norm" else (rows, columns)


@dataclass(frozen=True)
class ModelSpec:
    """A model spec describes a whole model.

    Attributes:
        width: D, the width of the hidden states.
        vocabulary: Number of rows of the embedding table.
        window: The most tokens of a pair.
        layers: The spec of each layer.
        norm: How the norms around the layers compute.
        pooling: The token that the head reads: ``"first"``, ``"last"``, or ``"mean"`` of all.
        types: Number of token types; 0 if the model has none.
        positions: Number of rows of the table of positions; 0 if the model has none.
        relative: Number of rows of the table of relative positions; 0 if the model has none.
        first_position: The row of a sequence's first token in the table of positions.
        scale: The factor of embeddings (Gemma and MiniCPM have one), rounded to the compute dtype.
        biased: The roles around the layers that have a bias.
        activation: Name of the head's activation, if the head has one.
        softcap: Bound of the logits, by a hyperbolic tangent; None for no bound.
        first_head: The first layer with a head of its own, for a model with several heads.
        typed: Whether a pair's document has the second token type; if not, all tokens have the first.
        temperature: The number that the head's logits are divided by.
        tied: Whether the embedding table is the output embedding as well, where none is stored.
        modules: The steps of a head that is made of modules.
        embedding: The width of the tables' rows; None for D. If it is another, a linear map brings them to D.
        absent: The roles around the layers that the family has and this model lacks.
        labels: The labels of a classifier.
    """

    width: int
    vocabulary: int
    window: int
    layers: tuple[LayerSpec, ...]
    norm: Norm
    pooling: Pooling
    types: int = 0
    positions: int = 0
    relative: int = 0
    first_position: int = 0
    scale: float = 1.0
    biased: frozenset[Role] = frozenset()
    activation: str = "tanh"
    softcap: float | None = None
    first_head: int = 1
    typed: bool = False
    temperature: float = 1.0
    tied: bool = False
    modules: tuple[HeadModule, ...] = ()
    embedding: int | None = None
    absent: frozenset[Role] = frozenset()
    labels: Labels = ONE

    @property
    def row(self) -> int:
        """The width of the tables' rows."""
        return self.embedding or self.width

    @property
    def depth(self) -> int:
        """The number of layers."""
        return len(self.layers)

    @property
    def causal(self) -> bool:
        """Whether a token sees only the tokens before it."""
        return self.layers[0].causal


@dataclass(frozen=True)
class Family:
    """A family describes one architecture. Its parts are functions and mappings, without any state.

    Attributes:
        architecture: The architecture's name in a checkpoint's ``config.json``.
        defaults: The fields that the spec depends on, with the values that transformers gives to those that a
            ``config.json`` leaves out.
        spec: ``fields -> ModelSpec``.
        layers: Prefix of the names of the layers' tensors, before their number.
        layer: Roles of a layer's linear maps and norms, by their names behind the number. Where a tensor holds
            several roles, rows of one after the other, the roles are a tuple.
        outside: Roles of the tables and norms around the layers, by their names: ``"table"``, ``"positions"``,
            ``"types"``, ``"embedding_norm"``, ``"projection"`` (behind that norm, if the tables have another width
            than the layers), ``"final_norm"``, ``"relative"`` (the table of relative positions) and
            ``"relative_norm"``.
        head: Roles of the head's linear maps and norms, by their names: ``"dense"``, ``"norm"``, ``"classifier"``,
            or ``"vocabulary"`` for an output embedding. A name and role with ``{}`` are those of several heads,
            numbered from 0.
        score: ``(spec, weights of the head, states, number) -> scores``, from float32 ``[N, D]`` after layer
            ``number`` to ``[N]``, or to embeddings ``[N, E]`` if the family is listwise. The states have been
            through the final norm.
        causal: Whether a token sees only the tokens before it.
        fixed: Fields that must have this value, if a ``config.json`` has them: a value, or what a function makes
            of the other fields.
        asks: Whether the score is the logit of an answer, so that a tokenizer must tell its rows.
        prompt: Name of the official prompt of all models of this architecture; None if they have none.
        ropes: The kinds of rotary positions that the architecture knows.
        variants: Families of the same architecture whose layers' tensors have other names.
        own_names: The family's own names of fields, by the usual ones, which only messages do not use.
        listwise: Whether a sequence has all documents of a request, and a score is the cosine of embeddings.
    """

    architecture: str
    defaults: Fields
    spec: Callable[[Fields], ModelSpec]
    layers: str
    layer: Mapping[str, Role | tuple[Role, ...]]
    outside: Mapping[str, Role]
    head: Mapping[str, Role]
    score: Callable[[ModelSpec, Weights, Tensor, int], Tensor]
    causal: bool = False
    fixed: Fields = field(default_factory=dict)
    asks: bool = False
    prompt: str | None = None
    ropes: tuple[str, ...] = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
    variants: tuple[Family, ...] = ()
    own_names: Mapping[str, str] = field(default_factory=dict)
    listwise: bool = False

    def fitting(self, stored: Collection[str]) -> Family:
        """Return the variant that the names of a checkpoint's tensors are of; the family itself if none is."""
        for family in self.variants:
            first = f"{family.layers}.0.{next(iter(family.layer))}."
            if any(name.startswith(first) for name in stored):
                return family
        return self

    def field(self, name: str) -> str:
        """Return what the family's configurations call a field."""
        return self.own_names.get(name, name)

    def usual(self, stated: Fields) -> Fields:
        """Return the fields of a ``config.json`` by their usual names."""
        own = {usual: stated[name] for usual, name in self.own_names.items() if name in stated}
        return {name: value for name, value in stated.items() if name not in self.own_names.values()} | own


class Configuration(NamedTuple):
    """A configuration is what a ``config.json`` says about a model.

    Attributes:
        fields: The fields that the family knows, completed by its defaults.
        spec: The model's spec.
        family: The model's family.
    """

    fields: Fields
    spec: ModelSpec
    family: Family
