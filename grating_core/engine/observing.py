"""Calibration observes a model as it is, in 8 bits and without 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from grating_core.engine.scorer import Scorer
from grating_core.kernels.choice import kernels
from grating_core.lens.observations import Observe
from grating_core.lens.quantized import Model
from grating_core.models.packing import Packing


def observing(scorer: Scorer, load: Callable[[str, Sequence[str] | None], Scorer] | None) -> Model:
    """Return the function that opens a model for calibration.

    Args:
        scorer: The model as it is.
        load: Function that loads the model in a dtype, and in 8 bits but for some kinds of products; None if only
            the model as it is can be observed.
    """
    model = scorer.model
    own = model.packing if model.products == torch.int8 else None

    @contextmanager
    def opened(kept: Sequence[str] | None) -> Iterator[Observe]:
        wanted = None if kept is None else Packing.int8(model.dtype, kept)
        if wanted == own or load is None:
            yield scorer.observe
            return
        other = load(str(model.dtype).removeprefix("torch.") if wanted is None else "int8", kept)
        try:
            yield other.observe
        finally:
            other.close()

    return opened


def knows_8_bits(scorer: Scorer) -> bool:
    """Tell whether calibration looks at a model in 8 bits as well, which takes long without kernels for it."""
    model = scorer.model
    return model.products == torch.int8 or (model.device.type == "cpu" and kernels().has(torch.int8))
