"""A reranker learns from its user's texts how to prune and what its scores mean, and keeps what it has learnt."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from grating_core.engine.observing import knows_8_bits, layered, observing
from grating_core.engine.scorer import Scorer
from grating_core.files.places import expanded
from grating_core.lens.calibrate import Effort, calibrate
from grating_core.lens.probability import (
    FittedProbability,
    Judged,
    Probability,
    checked_judgements,
    fit_probability,
    logistic,
)
from grating_core.lens.pruning import ByLens
from grating_core.lens.recalibrate import Recalibration, for_a_caller, start_recalibration
from grating_core.lens.state import Sampling
from grating_core.lens.store import CalibratedLens, lens_directory
from grating_core.lifetime import Loaded
from grating_core.models.directory import shows_logits
from grating_core.opening.layered import load_unpruned
from grating_core.pruning import PruningPolicy
from grating_core.settings import RerankSettings


class Calibrated(Loaded[Scorer, RerankSettings]):
    """This is the part of a reranker that is calibrated.

    Args:
        identity: The identity of the model and of its question.
        pruning: How candidates are dropped early.
        sampling: The goal of recalibration; None for off.
        probability: Function that turns a raw score into a probability.
    """

    def __init__(
        self,
        identity: str,
        pruning: PruningPolicy | ByLens,
        sampling: Sampling | None,
        probability: Probability = logistic,
    ) -> None:
        self._sampling = sampling
        self._probability = probability
        self.identity = identity
        """The identity of the model and of its question. A lens belongs to one identity."""
        self.pruning = pruning
        """How candidates are dropped early."""
        self.recalibration = self._start_recalibration()
        """The recalibration and its results; None if it is off, or if there is no lens yet to recalibrate."""

    def probability(self, score: float) -> float:
        """Return the probability, from 0 to 1, that a text with this raw score is relevant.

        This is the mapping of :meth:`fit_probabilities`, if there is one for this model. Otherwise it is the
        logistic function of the score, which rerankers are trained with: of one label's logit, or of the
        difference between two labels or between yes and no, where it is their softmax. A listwise model's score
        is a cosine, which is shifted to the scale from 0 to 1.
        """
        return self._probability(score)

    @property
    def fitted_probability(self) -> FittedProbability | None:
        """The mapping from scores to probabilities that was fitted to judgements; None if there is none."""
        return self._probability if isinstance(self._probability, FittedProbability) else None

    @property
    def shows_logits(self) -> bool:
        """Whether sentence-transformers shows raw scores of this model: its checkpoint names ``Identity`` then."""
        return shows_logits(self.model_path)

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
        judgements: Iterable[tuple[str, str, Any]] | None = None,
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
            candidates: Number of documents of a request. Every tenth request has five times as many, or as many as
                there are, so that something is known of larger requests.
            requests: Number of requests to compute; fewer if there are fewer queries. With n requests no promise
                above 1 - 1 / (n + 1) can be made, and for larger requests above 1 - 10 / (n + 10).
            judgements: Triples of query, text and whether the text is relevant, by which probabilities are fitted
                as well, see :meth:`fit_probabilities`. None leaves them as they are.
            output: Directory of the lens; None for grating's cache.
            seed: Seed of the choice of queries.
            show_progress: Whether to show progress bars on standard error.

        Returns:
            The lens. Its ``summary`` says how much it saves and loses.

        Raises:
            ValueError: An argument is not usable, there is too little text, or transformers computes the model.
            StorageError: The output cannot be written, or grating's cache has no room for the observations.
        """
        judged = None if judgements is None else checked_judgements(judgements)
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
        if judged is not None:
            self._fit(judged, place, show_progress=show_progress)
        return calibrated

    def fit_probabilities(
        self, judgements: Iterable[tuple[str, str, Any]], *, show_progress: bool = False
    ) -> FittedProbability:
        """Fit the mapping from raw scores to probabilities to judgements.

        The mapping never falls, so rankings stay as they are. This reranker, and every later one of this model,
        uses it. It lies beside the lens: in the directory ``lens``, or else in grating's cache.

        Args:
            judgements: Triples of query, text, and True, False or a grade, which is relevant above 0. Take texts
                as they will come, such as the first 20 of a search: among texts that nobody would find, relevant
                ones are too rare. With 1,000 or more, isotonic regression is used, and Platt's method with fewer.
            show_progress: Whether to show a progress bar on standard error.

        Returns:
            The mapping.

        Raises:
            ValueError: A judgement is none; or there are fewer than 10 relevant texts, or than 10 others; or
                higher scores are not more relevant.
            StorageError: The mapping cannot be written.
        """
        named = None if self.settings is None else self.settings.lens
        place = lens_directory(self.identity) if named is None else expanded(named)
        return self._fit(checked_judgements(judgements), place, show_progress=show_progress)

    def _fit(self, judged: Judged, place: Path, *, show_progress: bool) -> FittedProbability:
        fitted = fit_probability(self.score(judged.pairs, show_progress=show_progress), judged.relevant)
        fitted.save(place, self.identity)
        self._probability = fitted
        return fitted

    @abstractmethod
    def score(self, pairs: Iterable[tuple[str, str]], *, show_progress: bool = False) -> list[float]:
        """Compute the relevance of each text to its query, by the full model."""

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
