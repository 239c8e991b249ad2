"""A walk takes the slices of a pass through one layer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from grating_core.engine.ragged import Part, Slice, filled
from grating_core.layers.attention import ragged_attention
from grating_core.layers.keys_values import KeysValues
from grating_core.layers.rotary import Angles
from grating_core.layers.sending import sent
from grating_core.layers.spans import Span
from grating_core.layers.varlen import gathered, serves
from grating_core.models.family import Pooling
from grating_core.models.layered import Layer

Asked = list[tuple[Part, Part]]
"""Parts of a slice whose output is asked for, each with what of it is asked for."""


class Walk:
    """A walk keeps the keys and values of one layer as long as tokens of a later slice attend to them.

    Args:
        layer: The layer.
        angles: Angles at the positions from 0 on; None if the layer has no rotary positions.
        only: Which tokens' output is needed, see :meth:`Slice.asked`.
    """

    def __init__(self, layer: Layer, angles: Angles | None, only: Pooling = "mean") -> None:
        self._layer = layer
        self._angles = angles
        self._only = only
        self._shared: KeysValues | None = None  # of the tokens that the sequences of one request share
        self._long: KeysValues | None = None  # of a sequence that does not fit into a slice

    def step(self, part: Slice, hidden: Tensor, positions: Tensor | None) -> tuple[Tensor, list[Part]]:
        """Take a slice through the layer, as far as its step goes. The slices come in order.

        Args:
            part: The slice.
            hidden: Hidden states before the layer, ``[rows, D]``; fill behind the slice's tokens has any values.
                Those after the layer may take their place.
            positions: Positions of the tokens, int64 ``[rows]``, counted from 0 within each sequence; None if the
                layer has no rotary positions.

        Returns:
            Hidden states after the layer, ``[rows, D]``, of the tokens that are asked for, perhaps with fill
            behind them; and which tokens they are.
        """
        spec, weights, mlp = self._layer
        steps = self._layer.steps
        asked = part.asked(self._only) if part.queries else []
        states = steps.prepared(spec, weights, hidden)
        turned = None if self._angles is None or positions is None else self._angles.at(positions)
        key = value = hidden
        if part.keys:
            key, value = steps.keys_and_values(spec, weights, states, turned)
            self._keep(part, key, value)
        if not asked:
            return hidden[:0], []
        if self._only != "mean":
            rows = self._rows(asked, hidden.device)
            hidden, states, turned = hidden[rows], states[rows], turned and turned.at(rows)
        query = steps.queries(spec, weights, states, turned)
        attended = ragged_attention(spec, query, self._spans(asked, key, value))
        output: Tensor = steps.finished(spec, weights, hidden, attended, mlp)
        return output, [wanted for _, wanted in asked]

    def _keep(self, part: Slice, key: Tensor, value: Tensor) -> None:
        """Keep the keys and values that later slices need."""
        for one in part.parts:
            piece, rows = one.piece, (slice(None), one.rows)
            if piece.candidate is None:
                if one.start == 0:
                    self._shared = self._room(piece.length, key)
                _there(self._shared).extend(key[rows], value[rows])
            elif not one.whole:
                if one.start == 0:
                    self._long = self._room(piece.before + piece.length, key)
                    if piece.before:
                        shared = _there(self._shared)
                        self._long.extend(shared.key, shared.value)
                _there(self._long).extend(key[rows], value[rows])

    def _room(self, tokens: int, like: Tensor) -> KeysValues:
        return KeysValues(self._layer.spec, tokens, dtype=like.dtype, device=like.device)

    def _rows(self, asked: Asked, device: torch.device) -> Tensor:
        """Return the rows of single tokens that are asked for, and fill, int64."""
        rows = [part.rows.start + wanted.start - part.start for part, wanted in asked]
        fill = filled(len(rows)) - len(rows) if self._layer.fills else 0
        return sent(pad(torch.tensor(rows), (0, fill)), device)

    def _spans(self, asked: Asked, key: Tensor, value: Tensor) -> Iterator[Span]:
        """Yield what the queries of each part attend to."""
        if self._shared is not None and serves(self._layer.spec, key) and all(part.whole for part, _ in asked):
            own = [slice(0, 0) if part.piece.candidate is None else part.rows for part, _ in asked]
            for (part, wanted), those in zip(asked, gathered(self._shared, key, value, own), strict=True):
                yield Span(wanted.rows, *those, part.piece.before + wanted.start)
            return
        for part, wanted in asked:
            yield self._span(part, wanted, key, value)

    def _span(self, part: Part, wanted: Part, key: Tensor, value: Tensor) -> Span:
        """Return what the queries of a part that are wanted attend to."""
        piece = part.piece
        first = piece.before + wanted.start
        if piece.candidate is None or not part.whole:
            kept = _there(self._shared if piece.candidate is None else self._long)
            return Span(wanted.rows, kept.key, kept.value, first)
        shared = _there(self._shared) if piece.before else None
        before = None if shared is None else (shared.key, shared.value)
        return Span(wanted.rows, key[:, part.rows], value[:, part.rows], first, before)


def _there(kept: KeysValues | None) -> KeysValues:
    assert kept is not None, "the slices came out of order"
    return kept
