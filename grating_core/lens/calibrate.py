"""Calibration: requests are made of the user's texts and computed to the end, and a lens is fitted to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from grating_core import arguments
from grating_core.arguments import whole_number
from grating_core.lens.fit import fit
from grating_core.lens.observations import Observe, observe_all
from grating_core.lens.requests import FEWEST_REQUESTS, Request, make_requests
from grating_core.lens.store import CalibratedLens, require_room_for_lens
from grating_core.models.cross_encoder import Shape

Corpora = Mapping[str, Iterable[str]]


def calibrate(
    observe: Observe,
    shape: Shape,
    fingerprint: str,
    documents: Iterable[str] | Corpora,
    queries: Iterable[str] | Corpora | None,
    *,
    top_k: int,
    candidates: int,
    requests: int,
    target: float,
    directory: Path,
    seed: int,
    show_progress: bool,
) -> CalibratedLens:
    """Fit a lens to a model, and save it.

    Args:
        observe: Computes a request with the model, without pruning.
        shape: Shape of the model.
        fingerprint: Identity of the model.
        documents: The other arguments are those of :meth:`grating_core.Reranker.calibrate`.
        queries: See there.
        top_k: See there.
        candidates: See there.
        requests: See there.
        target: The promise for which the summary says what is saved and lost.
        directory: Where the lens is saved.
        seed: See there.
        show_progress: See there.

    Raises:
        ValueError: An argument is not usable; the message names it. Raised before anything is computed.
        StorageError: The lens cannot be saved, or there is no room for what is observed.
    """
    top_k, candidates = whole_number("top_k", top_k), whole_number("candidates", candidates)
    requests, seed = whole_number("requests", requests), whole_number("seed", seed, 0)
    if not top_k < candidates:
        raise ValueError(f"top_k={top_k} must be below candidates={candidates}")
    if requests < FEWEST_REQUESTS:
        raise ValueError(f"requests={requests} are too few to fit a lens: use {FEWEST_REQUESTS} or more")
    made = _requests_of(documents, queries, candidates=candidates, requests=requests, seed=seed)
    require_room_for_lens(directory, shape)
    calibrated = fit(
        [observe_all(observe, some, shape, show_progress=show_progress) for some in made],
        pooling=shape.pooling,
        fingerprint=fingerprint,
        top_k=top_k,
        target=target,
        show_progress=show_progress,
    )
    calibrated.save(directory)
    return calibrated


def _requests_of(
    documents: Iterable[str] | Corpora,
    queries: Iterable[str] | Corpora | None,
    *,
    candidates: int,
    requests: int,
    seed: int,
) -> list[list[Request]]:
    """Make as many requests of each corpus."""
    corpora = documents if isinstance(documents, Mapping) else {"documents": documents}
    asked = queries if isinstance(queries, Mapping) else dict.fromkeys(corpora, queries)
    if unknown := asked.keys() - corpora.keys():
        raise ValueError(f"queries are given for {sorted(unknown)}, but documents only for {sorted(corpora)}")
    return [
        make_requests(
            arguments.texts("documents", texts),
            None if (some := asked.get(name)) is None else arguments.texts("queries", some),
            candidates=candidates,
            count=-(-requests // len(corpora)),
            seed=seed,
        )
        for name, texts in corpora.items()
    ]
