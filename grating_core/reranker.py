"""The reranker: the one class that most people touch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import wraps
from pathlib import Path
from threading import Event
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import torch

from grating_core import arguments
from grating_core.arguments import Guarantee, LongDocuments, check_query, whole_number
from grating_core.engine.scorer import Scorer
from grating_core.files.places import expanded
from grating_core.forking import Threads, computed
from grating_core.lens.calibrate import calibrate
from grating_core.lens.pruning import ByLens, check_share, plan_pruning
from grating_core.lens.recalibrate import Logged, Recalibration, start_recalibration
from grating_core.lens.state import Sampling
from grating_core.lens.store import CalibratedLens, lens_directory, warn_once
from grating_core.lifetime import Loaded, closed_on_error
from grating_core.opening import open_reranker
from grating_core.pruning import ClusterPolicy, Off, PruningPolicy
from grating_core.results import RankedDocument, RerankResult
from grating_core.settings import PruningName, RerankSettings
from grating_core.text.prompts import Prompt

_CALLS = 4  # of arerank at a time, where they need not take turns

_log = logging.getLogger("grating")

Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")


def _for_a_caller(
    method: Callable[Concatenate[Reranker, Arguments], Returned],
) -> Callable[Concatenate[Reranker, Arguments], Returned]:
    """The method, during which nothing is computed for recalibration."""

    @wraps(method)
    def call(self: Reranker, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Returned:
        recalibration = self.recalibration
        with nullcontext() if recalibration is None else recalibration.caller():
            return computed(method, self, *args, **kwargs)

    return call


class Reranker(Loaded[Scorer, RerankSettings]):
    """Finds the K of N documents that answer a query best, with a cross-encoder.

    All documents go through the model together, layer by layer, packed without padding; those that cannot
    reach the top K stop being computed. Made by :meth:`from_pretrained`. May be called from several threads, and
    from a forked child. Pickled or copied it is loaded again, from the same name with the same settings; a
    ``token`` is never written, so the other process needs its own.
    """

    def __init__(
        self,
        scorer: Scorer,
        *,
        model_path: Path,
        identity: str,
        pruning: PruningPolicy | ByLens,
        sampling: Sampling | None = None,
    ) -> None:
        self._loaded: Scorer | None = scorer
        self._template = scorer.template
        self._turn = scorer.turn
        self._calls = Threads(1 if scorer.takes_turns else _CALLS, "grating-rerank")
        self._sampling = sampling
        self.plan = scorer.plan
        """What the memory budget is spent on; None without a budget."""
        self.model_path = model_path
        """The local directory that the weights were read from."""
        self.identity = identity
        """What lenses and whatever else is learnt about these weights go by."""
        self.pruning = pruning
        """How candidates are dropped early."""
        self.recalibration = self._start_recalibration()
        """What ``recalibrate`` has found out so far; None if it is off, or if there is no lens yet to move."""

    @classmethod
    def from_pretrained(  # noqa: D417 - the settings describe the other arguments
        cls,
        model: str | Path,
        *,
        device: str | torch.device | None = RerankSettings.device,
        dtype: str | torch.dtype | None = RerankSettings.dtype,
        memory_budget: str | int | None = RerankSettings.memory_budget,
        pruning: PruningName | PruningPolicy | None = RerankSettings.pruning,
        target: float | None = RerankSettings.target,
        guarantee: Guarantee | None = RerankSettings.guarantee,
        lens: str | Path | None = RerankSettings.lens,
        recalibrate: float | None = RerankSettings.recalibrate,
        max_length: int | None = RerankSettings.max_length,
        long_documents: LongDocuments | None = RerankSettings.long_documents,
        template: Prompt | str | None = RerankSettings.template,
        instruction: str | None = RerankSettings.instruction,
        adapter: str | Path | None = RerankSettings.adapter,
        revision: str | None = RerankSettings.revision,
        token: str | bool | None = RerankSettings.token,
        cache_dir: str | Path | None = RerankSettings.cache_dir,
        local_files_only: bool | None = RerankSettings.local_files_only,
        show_progress: bool | None = RerankSettings.show_progress,
    ) -> Reranker:
        """Load a cross-encoder.

        :class:`~grating_core.settings.RerankSettings` describes all arguments. Most calls need these at most:

        Args:
            model: A hub id such as ``"cross-encoder/ms-marco-MiniLM-L12-v2"`` or ``"Qwen/Qwen3-Reranker-0.6B"``,
                a local directory in Hugging Face layout with safetensors weights, a language model's GGUF file, or
                ``"bundled:ms-marco-minilm-l12"``.
            device: ``"cpu"``, ``"cuda"`` or ``"mps"``; None takes the best that is there.
            dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``: bfloat16 where the processor has
                instructions for it, else float32.
            memory_budget: How much memory loading and reranking may take, in bytes or as a size such as
                ``"300MB"``; scores stay the same. None keeps everything in memory.
            pruning: ``"auto"``, ``"cluster"``, ``"off"`` or a policy object.
            target: The share of the full model's top K that pruning is to keep, on average.

        Raises:
            ModelNotFoundError: The name leads to no usable weights.
            UnsupportedModelError: The weights are of a kind that grating does not run.
            BudgetError: The memory budget is too small; the message states the smallest that works. It is a
                ``ValueError`` as well.
            FileError: There is no lens in that directory, it is damaged, or it is for other weights.
            ValueError: An argument is not usable; the message names it. None is as if it were not given, for all.
        """
        given = locals()
        del given["cls"]
        return cls.open(RerankSettings(**given))

    @classmethod
    def shared(cls, model: str | Path, **settings: Any) -> Reranker:
        """Return the process's one reranker with these settings, loaded if nobody holds it yet.

        It is freed when the last holder lets go of it. Do not close it: others may be using it.

        Args:
            model: As in :meth:`from_pretrained`.
            settings: As in :meth:`from_pretrained`; a policy object must be hashable.

        Raises:
            ValueError: The policy object is not hashable; and as :meth:`from_pretrained` does.
        """
        return cls.open_shared(RerankSettings(model=model, **settings))

    @classmethod
    def _open(cls, settings: RerankSettings) -> Reranker:
        check_share(settings.recalibrate, settings.pruning)
        opened = open_reranker(settings)
        with closed_on_error(opened):
            pruning: PruningPolicy | ByLens
            if isinstance(settings.pruning, str) and settings.pruning == "auto":
                pruning = ByLens(settings.target, settings.guarantee, opened.lens())
            else:
                pruning = _policy(settings.pruning)
            share = settings.recalibrate
            return cls(
                opened.load(),
                model_path=opened.directory,
                identity=opened.identity,
                pruning=pruning,
                sampling=Sampling(share, settings.target, settings.guarantee) if share else None,
            )

    def rerank(
        self,
        query: str,
        documents: Iterable[str],
        top_k: int = 10,
        *,
        scores: Literal["exact", "estimated"] = "exact",
    ) -> RerankResult:
        """Rank the documents by relevance to the query and return the best.

        Args:
            query: The question; not empty.
            documents: N texts, in any form that has an order: a list, an array, a generator. None at all,
                duplicates and empty strings are fine. Texts longer than the model's window are cut, and listed in
                the trace.
            top_k: How many to return. N or more returns all N, and nothing is pruned then.
            scores: ``"exact"``: what is returned went through every layer, so its scores are the full
                model's. ``"estimated"``: sure winners stop early as well, which is faster; their scores are
                estimates and marked so, and they rank before those that went on.

        Returns:
            The top ``min(top_k, N)`` documents, best first, and the trace.

        Raises:
            ValueError: An argument is not usable; the message names it. Raised before any computing.
            ScoreError: The model gave a score that is not a finite number.
            RuntimeError: The reranker has been closed.
        """
        return self._rerank(query, documents, top_k, scores)

    async def arerank(
        self,
        query: str,
        documents: Iterable[str],
        top_k: int = 10,
        *,
        scores: Literal["exact", "estimated"] = "exact",
    ) -> RerankResult:
        """:meth:`rerank` in a worker thread, so that the event loop goes on.

        When the task is cancelled, the computing stops after the chunk it is at.
        """
        self._model()
        abandoned = Event()
        try:
            return await self._calls.run(self._rerank, query, documents, top_k, scores, abandoned.is_set)
        finally:
            abandoned.set()

    @_for_a_caller
    def _rerank(
        self,
        query: str,
        documents: Iterable[str],
        top_k: int,
        scores: Literal["exact", "estimated"],
        pause: Callable[[], bool] | None = None,
    ) -> RerankResult:
        scorer = self.scorer
        documents = arguments.texts("documents", documents)
        check_query(query)
        top_k = whole_number("top_k", top_k)
        if scores not in ("exact", "estimated"):
            raise ValueError(f"scores={scores!r} must be 'exact' or 'estimated'")
        if isinstance(self.pruning, ByLens) and self.lens is None and top_k < len(documents):
            warn_once(
                f"pruning='auto' drops nothing with {self.model_path}, which has no lens: fit one to your texts "
                f"with 'grating calibrate' or Reranker.calibrate, or take pruning='off'"
            )
        recalibration = self.recalibration
        pruning = plan_pruning(
            self.pruning,
            len(documents),
            top_k,
            exact=scores == "exact",
            factor=1.0 if recalibration is None else recalibration.factor,
        )
        found = scorer.rank(query, documents, top_k, pruning, pause)
        ranking = [
            RankedDocument(winner.index, winner.score, documents[winner.index], winner.estimated)
            for winner in found.winners
        ]
        if recalibration is not None and top_k < len(documents):
            recalibration.sample(Logged(query, documents, tuple(ranked.index for ranked in ranking)))
        return RerankResult(ranking, found.trace)

    @_for_a_caller
    def score(self, pairs: Iterable[tuple[str, str]], *, show_progress: bool = False) -> list[float]:
        """The relevance of each text to its query, by the full model.

        Args:
            pairs: ``(query, text)`` for each score wanted, as a list, an array or a ``zip``. Queries may differ.
            show_progress: Show a progress bar on standard error.

        Returns:
            Scores in the order of the pairs.

        Raises:
            ValueError: A pair is not two strings, or its query is empty; the message names its index.
            ScoreError: The model gave a score that is not a finite number.
            RuntimeError: The reranker has been closed.
        """
        scorer = self.scorer
        return scorer.scores(arguments.pairs("pairs", pairs), show_progress=show_progress)

    def tail(self, text: str, tokens: int | None = None) -> str:
        """The end of a text: its last tokens, as the model counts them, or all of it if it has no more.

        A query that fills the window is refused; of a conversation the last words are what it is about.

        Args:
            text: A query, for instance.
            tokens: How many to keep, 1 or more; None for half of the window, which leaves the rest to a document.

        Raises:
            ValueError: ``tokens`` is below 1.
        """
        tokens = self.max_length // 2 if tokens is None else whole_number("tokens", tokens)
        kept = self._template.tail(text, tokens)
        if kept != text:
            _log.info("of a text of %d characters the last %d tokens are used", len(text), tokens)
        return kept

    @property
    def lens(self) -> CalibratedLens | None:
        """The lens that it prunes by, with its margins; None if it prunes otherwise."""
        return self.pruning.calibrated if isinstance(self.pruning, ByLens) else None

    @_for_a_caller
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
        """Fit a lens to this model and find the margins that keep a promise, on texts of your own.

        Takes as long as that many requests without pruning, and for the fit some hundred MB beside any
        ``memory_budget``. The lens then belongs to the model: it is found by every later ``pruning="auto"``, and
        this reranker uses it from now on if it was made so.

        Args:
            documents: Texts like those that will be reranked, more than ``candidates``. No judgements are needed.
                Or several corpora by name: the promise is then made for corpora that the lens has not seen, as
                each of them is to the others.
            queries: Questions like those that will be asked, or those of the corpora by name; None to make them of
                titles or leading sentences.
            top_k: The K for which the summary says what is saved and lost; the lens is for any.
            candidates: How many documents a request has. The margins are for as many or fewer; for more they are
                wider, and less is saved.
            requests: How many requests to compute; fewer if there are fewer queries. At least as many as the
                target needs: with n requests no promise above 1 - 2.5 / (n + 1) can be made.
            output: The directory that the lens is written to; None for grating's cache.
            seed: Seed of the choice of queries.
            show_progress: Show progress bars on standard error.

        Returns:
            The lens; its ``summary`` says what it will save and lose.

        Raises:
            ValueError: An argument is not usable, or there is too little text; the message names it.
            StorageError: The output cannot be written, or grating's cache has no room for what is recorded.
        """
        scorer = self.scorer
        place = lens_directory(self.identity) if output is None else expanded(output)
        calibrated = calibrate(
            scorer.observe,
            scorer.shape,
            self.identity,
            documents,
            queries,
            top_k=top_k,
            candidates=candidates,
            requests=requests,
            target=self.pruning.target if isinstance(self.pruning, ByLens) else RerankSettings.target,
            directory=place,
            seed=seed,
            show_progress=show_progress,
        )
        if isinstance(self.pruning, ByLens):
            if output is not None and self.settings is not None:
                self.settings = replace(self.settings, lens=place)
            self.pruning = replace(self.pruning, calibrated=calibrated.to(scorer.model.device))
            self._stop_recalibration()
            self.recalibration = self._start_recalibration()  # what was learnt was about other margins
        return calibrated

    def close(self) -> None:
        """Free the weights, close the files, stop the threads.

        Calls after this one raise ``RuntimeError``; calls in progress end normally.
        """
        self._stop_recalibration()
        super().close()

    @property
    def scorer(self) -> Scorer:
        """What computes its requests. Raises ``RuntimeError`` when the reranker has been closed."""
        return self._model()

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.scorer.model.device

    @property
    def dtype(self) -> torch.dtype:
        """What the layers compute in."""
        return self.scorer.model.dtype

    @property
    def max_length(self) -> int:
        """Most tokens of a query and a document together."""
        return self._template.window

    def count_tokens(self, text: str) -> int:
        """How many tokens the model's tokenizer makes of a text, special tokens not counted."""
        return self._template.count_tokens(text)

    def _start_recalibration(self) -> Recalibration[Scorer] | None:
        return start_recalibration(self.scorer, Scorer.full_scores, self.pruning, self.identity, self._sampling)

    def _stop_recalibration(self) -> None:
        if self.recalibration is not None:
            self.recalibration.close()


def _policy(pruning: str | PruningPolicy) -> PruningPolicy:
    if not isinstance(pruning, str):
        return pruning
    return ClusterPolicy() if pruning == "cluster" else Off()
