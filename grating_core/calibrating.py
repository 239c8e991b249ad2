"""A reranker learns from its user's texts how to prune, and keeps what it has learnt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from grating_core.engine.observing import knows_8_bits, layered, observing
from grating_core.engine.scorer import Scorer
from grating_core.files.places import expanded
from grating_core.lens.calibrate import Effort, calibrate
from grating_core.lens.probability import logistic
from grating_core.lens.pruning import ByLens
from grating_core.lens.recalibrate import Recalibration, for_a_caller, start_recalibration
from grating_core.lens.state import Sampling
from grating_core.lens.store import CalibratedLens, lens_directory
from grating_core.lifetime import Loaded
from grating_core.opening.layered import load_unpruned
from grating_core.pruning import PruningPolicy
from grating_core.settings import RerankSettings


class Calibrated(Loaded[Scorer, RerankSettings]):
    """This is the part of a reranker that is calibrated.

    Args:
        identity: The identity of the model and of its question.
        pruning: How candidates are dropped early.
        sampling: The goal of recalibration; None for off.
    """

    def __init__(self, identity: str, pruning: PruningPolicy | ByLens, sampling: Sampling | None) -> None:
        self._sampling = sampling
        self.identity = identity
        """The identity of the model and of its question. A lens belongs to one identity."""
        self.pruning = pruning
        """How candidates are dropped early."""
        self.recalibration = self._start_recalibration()
        """The recalibration and its results; None if it is off, or if there is no lens yet to recalibrate."""

    def probability(self, score: float) -> float:
        """Return the probability, from 0 to 1, that a text with this raw score is relevant.

        This is the logistic function of the score, which rerankers are trained with: of one label's logit, or of
        the difference between two labels or between yes and no, where it is their softmax.
        """
        return logistic(score)

    @property
    def lens(self) -> CalibratedLens | None:
        """The lens that this reranker prunes by, with its margins; None without a lens."""
        return self.pruning.calibrated if isinstance(self.pruning, ByLens) else None

    @for_a_caller
    def calibrate(
        self,
        documents: Iterable[str] | Mapping[str, Iterable[str]],
        queries: Iterable[str] | Mapping[str, Iterable[str]] | None = None,
        *,
        top_k: int = 5,
        candidates: int = 20,
        requests: int = 600,
        output: str | Path | None = None,
        seed: int = 0,
        show_progress: bool = False,
    ) -> CalibratedLens:
        """Fit a lens to this model on texts of your own, and find the margins that keep a promise.

        This takes as long as ``requests`` requests without pruning, twice where 8 bits have kernels, and some
        hundred MB beside a budget. This reranker, and every later ``pruning="auto"`` of this model, uses the lens.

        Args:
            documents: Texts like those that will be reranked, more than ``candidates``. No judgements are needed.
                With several corpora by name, the promise holds for corpora that the lens has not seen.
            queries: Questions like those that will be asked, or the questions of each corpus by name. None makes
                queries of titles or leading sentences.
            top_k: The K for which the summary says what is saved and lost. The lens works for any K.
            candidates: Number of documents of a request. Larger requests save less.
            requests: Number of requests to compute; fewer if there are fewer queries. With n requests no promise
                above 1 - 2.5 / (n + 1) can be made.
            output: Directory of the lens; None for grating's cache.
            seed: Seed of the choice of queries.
            show_progress: Whether to show progress bars on standard error.

        Returns:
            The lens. Its ``summary`` says how much it saves and loses.

        Raises:
            ValueError: An argument is not usable, there is too little text, or transformers computes the model.
            StorageError: The output cannot be written, or grating's cache has no room for the observations.
        """
        scorer = layered(self.scorer)
        place = lens_directory(self.identity) if output is None else expanded(output)
        effort = Effort(top_k=top_k, candidates=candidates, requests=requests, seed=seed)
        target = self.pruning.target if isinstance(self.pruning, ByLens) else RerankSettings.target
        again = None if self.settings is None else partial(load_unpruned, self.settings)
        calibrated = calibrate(
            observing(scorer, again), scorer.model.shape, self.identity, documents, queries, effort,
            quantizes=again is not None and knows_8_bits(scorer), target=target, directory=place,
            show_progress=show_progress,
        )  # fmt: skip
        if isinstance(self.pruning, ByLens):
            if self.settings is not None:
                self.settings = replace(self.settings, lens=None if output is None else place)
            used = scorer.take_over(calibrated)
            self.pruning = replace(self.pruning, calibrated=used and used.to(scorer.model.device))
            if self.recalibration is not None:
                self.recalibration.close()  # what it has learnt is for other margins
            self.recalibration = self._start_recalibration()
        return calibrated

    @property
    def scorer(self) -> Scorer:
        """The scorer, which computes the requests. Raises ``RuntimeError`` when the reranker has been closed."""
        return self._model()

    def close(self) -> None:
        """Free weights, files and threads."""
        if self.recalibration is not None:
            self.recalibration.close()
        super().close()

    def _start_recalibration(self) -> Recalibration[Scorer] | None:
        return start_recalibration(self.scorer, Scorer.full_scores, self.pruning, self.identity, self._sampling)
