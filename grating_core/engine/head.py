"""A head reader reads the scores of a request with the model's own head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grating_core.layers.sending import integers, sent
from grating_core.lens.features import Part
from grating_core.lens.together import is_together, sums_of
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
            if own:
                self._add(self._sums(states, own), own)
            return
        places = []
        for part in own:
            place = 0 if self._model.spec.pooling == "first" else part.piece.length - 1
            if 0 <= place - part.start < part.rows.stop - part.rows.start:
                places.append(part.rows.start + place - part.start)
        if places:
            read = states.index_select(0, sent(integers(places), states.device))
            self._states.append(self._model.normed(read.float()))

    def _sums(self, states: Tensor, parts: Sequence[Part]) -> Tensor:
        """Return the sum of the normed states of each part, float32 ``[N, D]``."""
        if not is_together(states.device):
            return torch.stack([self._model.normed(states[part.rows].float()).sum(0) for part in parts])
        rows = states[parts[0].rows.start : parts[-1].rows.stop]
        return sums_of(self._model.normed(rows.float()), [part.rows.stop - part.rows.start for part in parts])

    def _add(self, sums: Tensor, parts: Sequence[Part]) -> None:
        """Add each part's share of the mean of its sequence. Only the first part may go on with a sequence."""
        lengths = torch.tensor([[part.piece.length] for part in parts])
        shares = sums / sent(lengths, sums.device)
        if parts[0].start:
            self._states[-1][-1:] += shares[:1]
            shares = shares[1:]
        if len(shares):
            self._states.append(shares)

    def scores(self) -> Tensor:
        """Return the scores of the sequences, float32 ``[N]``."""
        return self._model.score(torch.cat(self._states), self._number)
