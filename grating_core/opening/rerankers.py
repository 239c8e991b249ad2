"""A reranker is opened for grating's own layers, or for transformers', as its engine says."""

from __future__ import annotations

from grating_core.models.by_transformers import needs_transformers
from grating_core.opening.found import find
from grating_core.opening.layered import open_layered
from grating_core.opening.listwise import open_listwise, reads_lists
from grating_core.opening.opened import OpenReranker
from grating_core.opening.padded import open_padded
from grating_core.settings import RerankSettings


def open_reranker(settings: RerankSettings) -> OpenReranker:
    """Find a reranker and read everything but its weights.

    Args:
        settings: The reranker's settings.

    Raises:
        ModelNotFoundError: The name leads to no usable weights.
        UnsupportedModelError: Neither grating nor transformers runs weights of this kind, or not within a budget.
        BudgetError: The memory budget is too small; the message states the smallest that works.
        ValueError: A setting does not fit this machine or this model.
    """
    found = find(settings)
    auto = settings.engine == "auto"
    if settings.engine == "transformers" or (auto and needs_transformers(found.directory)):
        return open_padded(settings, found)
    if reads_lists(found.directory):
        return open_listwise(settings, found)
    return open_layered(settings, found)
