"""A layer spec holds everything that a layer's mathematics depends on, beside its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = str
"""What a weight is for, whatever a checkpoint calls it, such as ``"query"`` or ``"output_norm"``.

A linear map or norm of a role has a tensor ``role.weight`` and perhaps ``role.bias``. A layer has these roles:

* ``input_norm``: the norm before attention;
* ``query``, ``key``, ``value``: linear maps of the normed states; ``query_norm`` and ``key_norm``, for each head;
* ``output``: the linear map of what attention gives;
* ``attention_norm``: the norm of that output, or behind the first residual sum;
* ``mlp_norm``: the norm before the MLP;
* ``gate``, ``up``, ``down``: the MLP, ``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` without a gate;
* ``output_norm``: the norm of the MLP's output, or behind the second residual sum;
* ``position_key``, ``position_query``: linear maps of the table of relative positions, see :class:`Relative`.

Where a layer has no weights for a norm, the states pass that place unchanged.
"""


@dataclass(frozen=True)
class Norm:
    """A norm divides a state by its size.

    Attributes:
        kind: ``"layer"`` for LayerNorm, ``"rms"`` for RMSNorm.
        eps: The number that is added to the variance.
        offset: The number that is added to the weight (Gemma stores weights less 1).
    """

    kind: Literal["layer", "rms"]
    eps: float
    offset: float = 0.0


@dataclass(frozen=True)
class Rotary:
    """Rotary positions turn pairs of entries of queries and keys by angles that grow with the position.

    Attributes:
        frequencies: The angle by which each pair turns from one token to the next, as float32 numbers; half as
            many as a head has entries.
        scale: The factor of the turned entries (YaRN has one); 1 for none.
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0


@dataclass(frozen=True)
class Relative:
    """Relative positions give keys and queries to distances between tokens (DeBERTa, arXiv 2006.03654).

    A distance has a row of a table, and linear maps of the table are keys and queries of positions. The products
    of a token's query with the keys of positions, and of a token's key with their queries, are added to the
    products of queries and keys.

    Attributes:
        span: Number of rows for distances of one direction; the table has twice as many.
        buckets: Whether distances beyond half of the span share rows, the more of them the farther away.
        farthest: The distance in tokens of the last row, where distances share rows.
        key: The role of the map that gives keys: ``"key"``, ``"position_key"``, or None for no such products.
        query: The role of the map that gives queries: ``"query"``, ``"position_query"``, or None.
    """

    span: int
    buckets: bool
    farthest: int
    key: Role | None
    query: Role | None


@dataclass(frozen=True)
class LayerSpec:
    """A layer spec describes one layer.

    Attributes:
        width: D, the width of the hidden states.
        heads: Number of heads of the query.
        key_heads: Number of heads of keys and values; each serves ``heads / key_heads`` heads of the query.
        head_size: Number of entries of a head.
        inner: F, the width of the MLP inside.
        norm: How all norms of the layer compute.
        activation: Name of the MLP's activation, see :data:`grating_core.kernels.activations.ACTIVATIONS`.
        gated: Whether the MLP has a gate.
        norm_behind: Whether the norms stand behind the residual sums (BERT), and not before what is added.
        causal: Whether a token sees only those before it.
        scaling: The factor of the products of queries and keys.
        window: Distance in tokens below which a token sees another; None for any distance.
        softcap: Bound of the scaled products, by a hyperbolic tangent; None for no bound.
        rotary: The rotary positions; None for none.
        relative: The relative positions; None for none.
        residual: The factor of what a layer adds to the residual (MiniCPM has one).
        biased: The roles of linear maps and norms that have a bias.
        absent: The roles of the family that this layer lacks.
    """

    width: int
    heads: int
    key_heads: int
    head_size: int
    inner: int
    norm: Norm
    activation: str
    gated: bool
    norm_behind: bool = False
    causal: bool = False
    scaling: float = 1.0
    window: int | None = None
    softcap: float | None = None
    rotary: Rotary | None = None
    relative: Relative | None = None
    residual: float = 1.0
    biased: frozenset[Role] = frozenset()
    absent: frozenset[Role] = frozenset()

    def shape(self, role: Role) -> tuple[int, ...]:
        """Return the shape of the weight of a role."""
        own, shared = self.heads * self.head_size, self.key_heads * self.head_size
        shapes = {
            "query": (own, self.width),
            "key": (shared, self.width),
            "value": (shared, self.width),
            "output": (self.width, own),
            "gate": (self.inner, self.width),
            "up": (self.inner, self.width),
            "down": (self.width, self.inner),
            "position_query": (own, self.width),
            "position_key": (own, self.width),
            "query_norm": (self.head_size,),
            "key_norm": (self.head_size,),
        }
        return shapes.get(role, (self.width,))
