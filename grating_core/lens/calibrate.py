"""Calibration: requests are made of the user's texts and computed to the end, and a lens is fitted to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from grating_core import arguments
from grating_core.arguments import whole_number
from grating_core.lens.features import look_costs
from grating_core.lens.fit import fit
from grating_core.lens.observations import observe_all
from grating_core.lens.quantized import Model, quantize
from grating_core.lens.requests import FEWEST_REQUESTS, make_requests
from grating_core.lens.store import CalibratedLens, require_room_for_lens
from grating_core.models.cross_encoder import Shape
from grating_core.requests import Request

Corpora = Mapping[str, Iterable[str]]


@dataclass(frozen=True)
class Effort:
    """This class says how much is computed to calibrate; see :meth:`grating_core.Reranker.calibrate`.

    Raises:
        ValueError: A number is not usable; the message names it.
    """

    top_k: int
    candidates: int
    requests: int
    seed: int

    def __post_init__(self) -> None:
        for name, least in (("top_k", 1), ("candidates", 1), ("requests", 1), ("seed", 0)):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least))
        if not self.top_k < self.candidates:
            raise ValueError(f"top_k={self.top_k} must be below candidates={self.candidates}")
        if self.requests < FEWEST_REQUESTS:
            raise ValueError(f"requests={self.requests} are too few to fit a lens: use {FEWEST_REQUESTS} or more")


def calibrate(
    model: Model,
    shape: Shape,
    identity: str,
    documents: Iterable[str] | Corpora,
    queries: Iterable[str] | Corpora | None,
    effort: Effort,
    *,
    quantizes: bool,
    target: float,
    directory: Path,
    show_progress: bool,
) -> CalibratedLens:
    """Fit a lens to a model, and save it.

    Args:
        model: Function that opens the model.
        shape: Shape of the model.
        identity: Identity of the model.
        documents: Texts, or corpora by name; see :meth:`grating_core.Reranker.calibrate`.
        queries: Questions, or those of the corpora by name; None makes them of the documents.
        effort: The amount of computing.
        quantizes: Whether the model is looked at in 8 bits as well.
        target: The promise for which the summary says what is saved and lost.
        directory: Directory of the lens.
        show_progress: Whether to show progress bars on standard error.

    Raises:
        ValueError: There is too little text. Raised before anything is computed.
        StorageError: The lens cannot be saved, or there is no room for the observations.
    """
    made = _requests_of(documents, queries, effort)
    require_room_for_lens(directory, shape)
    with model(False) as observe:
        full = [observe_all(observe, some, shape, show_progress=show_progress) for some in made]
    in_8_bits = None
    if quantizes and effort.candidates > 5:
        in_8_bits = quantize(model, made, full, shape, show_progress=show_progress)
    calibrated = fit(
        full,
        pooling=shape.pooling,
        fingerprint=identity,
        costs=look_costs(shape),
        top_k=effort.top_k,
        target=target,
        quantized=in_8_bits,
        show_progress=show_progress,
    )
    calibrated.save(directory)
    return calibrated


def _requests_of(
    documents: Iterable[str] | Corpora, queries: Iterable[str] | Corpora | None, effort: Effort
) -> list[list[Request]]:
    """Make the same number of requests of each corpus."""
    corpora = documents if isinstance(documents, Mapping) else {"documents": documents}
    asked = queries if isinstance(queries, Mapping) else dict.fromkeys(corpora, queries)
    if unknown := asked.keys() - corpora.keys():
        raise ValueError(f"queries are given for {sorted(unknown)}, but documents only for {sorted(corpora)}")
    return [
        make_requests(
            arguments.texts("documents", texts),
            None if (some := asked.get(name)) is None else arguments.texts("queries", some),
            candidates=effort.candidates,
            count=-(-effort.requests // len(corpora)),
            seed=effort.seed,
            large=True,
        )
        for name, texts in corpora.items()
    ]
