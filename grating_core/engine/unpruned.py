"""An unpruned scorer computes every document through all layers, because its model shows no scores before."""

from __future__ import annotations

from typing import ClassVar

from grating_core.engine.job import Job
from grating_core.engine.one_pass import Outcome
from grating_core.engine.scorer import Scorer
from grating_core.lens.pruning import Pruning
from grating_core.models.by_transformers import Classifier
from grating_core.models.cross_encoder import CrossEncoder
from grating_core.pruning import Off
from grating_core.requests import Request


class UnprunedScorer(Scorer):
    """An unpruned scorer refuses requests that need scores between layers."""

    model: Classifier | CrossEncoder
    _who: ClassVar[str]
    """What messages say computes every document."""

    def job(self, request: Request, pruning: Pruning) -> Job[Outcome]:
        """See :meth:`Scorer.job`.

        Raises:
            ValueError: The request asks for what needs the states between layers.
        """
        asked = {
            "scores": request.scores if request.scores != "exact" else None,
            "pruning": None if isinstance(request.pruning, Off) else request.pruning,
            "target": request.target,
        }
        for name, value in asked.items():
            if value is not None:
                raise ValueError(
                    f"{name}={value!r}: {self._who} computes every document through all layers, so that nothing "
                    f"is estimated or dropped; leave {name} out"
                )
        return super().job(request, pruning)
