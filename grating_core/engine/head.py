"""A head reader reads the scores of a request with the model's own head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grating_core.layers.sending import sent
from grating_core.lens.features import Part
from grating_core.models.cross_encoder import CrossEncoder


class HeadReader:
    """A head reader takes the states of a request's tokens after one layer, slice after slice.

    Args:
        model: The model.
        number: The layer.
    """

    def __init__(self, model: CrossEncoder, number: int) -> None:
        self._model = model
        self._number = number
        self._states: list[Tensor] = []

    def see(self, states: Tensor, parts: Sequence[Part]) -> None:
        """Take the states ``[T, D]`` of the next parts of the request."""
        own = [part for part in parts if part.piece.segments is not None]
        if self._model.spec.pooling == "mean":
            for part in own:
                self._add(self._model.normed(states[part.rows].float()).sum(0) / part.piece.length, part)
            return
        rows = []
        for part in own:
            place = 0 if self._model.spec.pooling == "first" else part.piece.length - 1
            if 0 <= place - part.start < part.rows.stop - part.rows.start:
                rows.append(part.rows.start + place - part.start)
        if rows:
            read = states[sent(torch.tensor(rows), states.device)]
            self._states.append(self._model.normed(read.float()))

    def _add(self, share: Tensor, part: Part) -> None:
        """Add a part's share of the mean of a sequence."""
        if part.start:
            self._states[-1] += share
        else:
            self._states.append(share[None])

    def scores(self) -> Tensor:
        """Return the scores of the sequences, float32 ``[N]``."""
        return self._model.score(torch.cat(self._states), self._number)
