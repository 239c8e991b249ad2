"""Calibration observes a model as it is, in 8 bits and without 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from grating_core.engine.listwise import ListScorer
from grating_core.engine.scorer import LayerScorer, Scorer
from grating_core.kernels.choice import kernels
from grating_core.lens.observations import Observe
from grating_core.lens.quantized import Model


def layered(scorer: Scorer) -> LayerScorer:
    """Return a scorer whose layers can be observed.

    Raises:
        ValueError: transformers computes the model, or the model reads several documents at once.
    """
    if isinstance(scorer, LayerScorer):
        return scorer
    if isinstance(scorer, ListScorer):
        raise ValueError(
            "calibrate fits a lens that drops documents early, and a listwise model drops none, because it reads "
            "all documents together: use it without a lens"
        )
    raise ValueError(
        "calibrate fits a lens to the states between layers, which engine='transformers' does not show: take a "
        "model that grating's own layers compute"
    )


def observing(scorer: LayerScorer, load: Callable[[str], LayerScorer] | None) -> Model:
    """Return the function that opens a model for calibration.

    Args:
        scorer: The model as it is.
        load: Function that loads the model in a dtype; None if only the model as it is can be observed.
    """
    model = scorer.model

    @contextmanager
    def opened(in_8_bits: bool) -> Iterator[Observe]:
        if load is None or in_8_bits == (model.products == torch.int8):
            yield scorer.observe
            return
        other = load("int8" if in_8_bits else str(model.dtype).removeprefix("torch."))
        try:
            yield other.observe
        finally:
            other.close()

    return opened


def knows_8_bits(scorer: LayerScorer) -> bool:
    """Tell whether calibration looks at a model in 8 bits as well, which takes long without kernels for it."""
    model = scorer.model
    return model.products == torch.int8 or (model.device.type == "cpu" and kernels().has(torch.int8))
