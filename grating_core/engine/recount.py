"""A recount scores a few candidates of a close contest again, without 8 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from grating_core.engine.contest import Contest
from grating_core.engine.forward import forward
from grating_core.engine.job import UNPRUNED, Job
from grating_core.engine.ragged import RaggedBatch
from grating_core.memory.hidden import HiddenInMemory
from grating_core.models.cross_encoder import CrossEncoder


@dataclass(frozen=True)
class Recount:
    """A recount has the model that decides what is in doubt.

    Attributes:
        model: The model without 8 bits, all of it in memory.
        doubt: The distance from the bar of the top K within which a score in 8 bits is in doubt, see
            :mod:`grating_core.pruning.recount`.
    """

    model: CrossEncoder
    doubt: float

    def settle(self, job: Job[Any], contest: Contest, *, slice_tokens: int) -> None:
        """Score those again who are in doubt when a contest is over, if there is time for it.

        If that fails, the contest has an error.
        """
        candidates = contest.in_doubt(self.doubt)
        if not candidates:
            return
        if not contest.has_time_to_recount(candidates):
            contest.cut_short = True
            return
        again = [job.encoded[candidate] for candidate in candidates]
        windows = tuple(map(len, again))
        recounted = Contest(windows, UNPRUNED, len(again), self.model.depth, numbers=candidates, looks=False)
        batch = RaggedBatch.pack([again], share_prefix=self.model.spec.causal)
        hidden = HiddenInMemory(batch.tokens, self.model.width, self.model.dtype, self.model.device)
        for _ in forward(self.model, batch, hidden, [recounted], slice_tokens=slice_tokens):
            contest.settle(candidates, recounted)
