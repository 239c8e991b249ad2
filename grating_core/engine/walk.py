"""A walk takes the slices of a pass through one layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from grating_core.engine.ragged import Slice, filled
from grating_core.kernels.operands import Seen
from grating_core.kernels.room import Room
from grating_core.layers.attention import ragged_attention
from grating_core.layers.keys_values import KeysValues
from grating_core.layers.rotary import Angles
from grating_core.layers.sending import integers, sent
from grating_core.models.layered import Layer

Beside = Callable[[Slice, Tensor, Tensor, Seen], None]
"""A function that is given a slice, states and queries of what is asked for, and the keys and values they see."""


class Walk:
    """A walk keeps the keys and values of one layer as long as tokens of a later slice attend to them.

    Args:
        layer: The layer.
        angles: Angles at the positions from 0 on; None if the layer has no rotary positions.
        room: The memory for intermediate results.
        beside: What else looks at queries, keys and values; None for nothing.
    """

    def __init__(self, layer: Layer, angles: Angles | None, room: Room, beside: Beside | None = None) -> None:
        self._layer = layer
        self._room = room
        self._angles = angles
        self._beside = beside
        self._places: tuple[Tensor | None, Tensor | None] = (None, None)  # keys and queries of relative positions
        if layer.spec.relative is not None:
            self._places = layer.steps.positions(layer.spec, layer.weights, layer.table)
        self._shared: KeysValues | None = None  # of the tokens that the sequences of one request share
        self._long: KeysValues | None = None  # of a sequence that does not fit into a slice

    def step(self, part: Slice, hidden: Tensor, positions: Tensor | None) -> Tensor:
        """Take a slice through the layer, as far as its step goes. The slices come in order.

        Args:
            part: The slice.
            hidden: Hidden states before the layer, ``[rows, D]``; fill behind the slice's tokens has any values.
                Those after the layer may take their place.
            positions: Positions of the tokens, int64 ``[rows]``, counted from 0 within each sequence; None if the
                layer has no rotary positions.

        Returns:
            Hidden states after the layer, ``[rows, D]``, of the tokens that are asked for, perhaps with fill
            behind them.
        """
        spec, weights, mlp, _ = self._layer
        steps = self._layer.steps
        states = steps.prepared(spec, weights, hidden, self._room)
        turned = None if self._angles is None or positions is None else self._angles.at(positions)
        key = value = hidden
        if part.keys:
            key, value = steps.keys_and_values(spec, weights, states, turned)
            self._keep(part, key, value)
        if not part.asked:
            return hidden[:0]
        if part.places is not None:
            rows = self._rows(part.places, hidden.device)
            hidden, states, turned = hidden[rows], states[rows], turned and turned.at(rows)
        query = steps.queries(spec, weights, states, turned)
        seen = self._seen(part, key, value)
        if self._beside is not None:
            self._beside(part, hidden, query, seen)
        attended = ragged_attention(spec, query, seen, part.spans, self._room, self._places)
        output: Tensor = steps.finished(spec, weights, hidden, attended, mlp)
        return output

    def _keep(self, part: Slice, key: Tensor, value: Tensor) -> None:
        """Keep the keys and values that later slices need."""
        one, *_ = part.parts
        piece = one.piece
        if piece.candidate is None:
            if one.start == 0:
                self._shared = self._new(piece.length, key)
            _there(self._shared).extend(key[one.rows], value[one.rows])
        elif not one.whole:
            if one.start == 0:
                self._long = self._new(piece.before + piece.length, key)
                if piece.before:
                    shared = _there(self._shared)
                    self._long.extend(shared.key, shared.value)
            _there(self._long).extend(key[one.rows], value[one.rows])

    def _new(self, tokens: int, like: Tensor) -> KeysValues:
        return KeysValues(self._layer.spec, tokens, dtype=like.dtype, device=like.device)

    def _rows(self, places: list[int], device: torch.device) -> Tensor:
        """Return rows that are asked for, and fill, int64."""
        fill = filled(len(places)) - len(places) if self._layer.fills else 0
        return sent(pad(integers(places), (0, fill)), device)

    def _seen(self, part: Slice, key: Tensor, value: Tensor) -> Seen:
        """Return the keys and values that a slice's spans name."""
        if not part.whole:
            kept = _there(self._shared if part.parts[0].piece.candidate is None else self._long)
            return Seen(kept.key, kept.value)
        if not any(span.shared for span in part.spans):
            return Seen(key, value)
        shared = _there(self._shared)
        return Seen(key, value, (shared.key, shared.value))


def _there(kept: KeysValues | None) -> KeysValues:
    assert kept is not None, "the slices came out of order"
    return kept
