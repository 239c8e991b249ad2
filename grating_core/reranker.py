"""The reranker is the one class that most people use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from grating_core import arguments
from grating_core.arguments import Guarantee, LongDocuments, Scores, whole_number
from grating_core.engine.job import Job
from grating_core.engine.observing import knows_8_bits, observing
from grating_core.engine.one_pass import Outcome
from grating_core.engine.passes import Passes
from grating_core.engine.scorer import Scorer
from grating_core.files.places import expanded
from grating_core.forking import Threads
from grating_core.lens.calibrate import Effort, calibrate
from grating_core.lens.pruning import ByLens, pruning_of
from grating_core.lens.recalibrate import Recalibration, calling, for_a_caller, start_recalibration
from grating_core.lens.state import Sampling
from grating_core.lens.store import CalibratedLens, lens_directory
from grating_core.lifetime import Loaded, closed_on_error
from grating_core.opening import load_unpruned, open_reranker
from grating_core.pruning import PruningPolicy
from grating_core.requests import Request, checked_requests
from grating_core.results import RerankResult
from grating_core.settings import PruningName, RerankSettings
from grating_core.telemetry import reranking, scoring
from grating_core.text.prompts import Prompt


class Reranker(Loaded[Scorer, RerankSettings]):
    """A reranker finds the K of N documents that answer a query best, with a cross-encoder.

    All documents go through the model together, layer by layer, packed without padding. Those that cannot reach
    the top K stop being computed. :meth:`from_pretrained` makes a reranker. Several threads may call it, and a
    forked child. Pickling and copying keep only the settings, without a ``token``; the model is then loaded again.
    """

    def __init__(
        self,
        scorer: Scorer,
        model_path: Path,
        identity: str,
        pruning: PruningPolicy | ByLens,
        sampling: Sampling | None = None,
    ) -> None:
        self._loaded: Scorer | None = scorer
        self._template = scorer.template
        self._turn = scorer.turn
        self._calls = Threads(1, "grating-rerank")
        self._passes = Passes(scorer.run, scorer.turn, self._calls, scorer.pass_tokens, scorer.lanes)
        self._sampling = sampling
        self.plan = scorer.plan
        """The plan of the memory budget; None without a budget."""
        self.model_path = model_path
        """The local directory that the weights were read from."""
        self.identity = identity
        """The identity of the model and of its question. A lens belongs to one identity."""
        self.pruning = pruning
        """How candidates are dropped early."""
        self.recalibration = self._start_recalibration()
        """The recalibration and its results; None if it is off, or if there is no lens yet to recalibrate."""

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
            device: ``"cpu"``, ``"cuda"`` or ``"mps"``; None takes the best device of this machine.
            dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, ``"int8"``, or ``"auto"``: bfloat16 where the
                processor has instructions for it, else float32; int8 if calibration found that it agrees.
            memory_budget: How much memory loading and reranking may take, in bytes or as a size such as
                ``"300MB"``; scores stay the same, but for rounding. None keeps everything in memory.
            pruning: ``"auto"``, ``"cluster"``, ``"off"`` or a policy object.
            target: The share of the full model's top K that pruning is to keep, on average.

        Raises:
            ModelNotFoundError: The name leads to no usable weights.
            UnsupportedModelError: grating does not run weights of this kind.
            BudgetError: The memory budget is too small (a ``ValueError``); the message states the smallest.
            FileError: There is no lens in that directory, it is damaged, or it is for other weights.
            ValueError: An argument is not usable; the message names it. None means that an argument is not given.
        """
        given = locals()
        del given["cls"]
        return cls.open(RerankSettings(**given))

    @classmethod
    def shared(cls, model: str | Path, **settings: Any) -> Reranker:
        """Return the process's one reranker with these settings, loaded if nobody holds it yet.

        It is freed when the last holder lets go of it. Do not close it: others may be using it. The arguments and
        errors are those of :meth:`from_pretrained`; a policy object must be hashable.
        """
        return cls.open_shared(RerankSettings(model=model, **settings))

    @classmethod
    def _open(cls, settings: RerankSettings) -> Reranker:
        sampling = Sampling.of(settings.recalibrate, settings.target, settings.guarantee, settings.pruning)
        opened = open_reranker(settings)
        with closed_on_error(opened):
            pruning = opened.pruning()  # before the weights, because a lens may be missing
            return cls(opened.load(), opened.directory, opened.identity, pruning, sampling)

    def rerank(
        self, query: str, documents: Iterable[str], top_k: int = 10, *, scores: Scores = "exact"
    ) -> RerankResult:
        """Rank the documents by relevance to the query and return the best.

        Args:
            query: The question; not empty.
            documents: N texts in any form that has an order, such as a list or a generator; N may be 0. Texts that
                are longer than the model's window are cut, and listed in the trace.
            top_k: Number of documents to return. N or more returns all N, and nothing is pruned then.
            scores: ``"exact"`` computes what is returned through every layer, so its scores are the full model's.
                ``"estimated"`` lets sure winners stop early as well, which is faster. Their scores are estimates
                and marked so, and they rank before those that went on.

        Returns:
            The top ``min(top_k, N)`` documents, best first, and the trace.

        Raises:
            ValueError: An argument is not usable; the message names it. Raised before any computing.
            ScoreError: The model gave a score that is not a finite number.
            RuntimeError: The reranker has been closed.
        """
        return self._rerank([Request.of(query, documents, top_k, scores)])[0]

    async def arerank(
        self, query: str, documents: Iterable[str], top_k: int = 10, *, scores: Scores = "exact"
    ) -> RerankResult:
        """Await what :meth:`rerank` returns. Waiting holds no thread; cancelling the task ends its computing."""
        request = Request.of(query, documents, top_k, scores)
        return await self.awaited(request, self.job(request))

    def job(self, request: Request) -> Job[Outcome]:
        """Return the job of a checked request, which tells its tokens before anybody computes it."""
        factor = 1.0 if self.recalibration is None else self.recalibration.factor
        return self.scorer.job(request, pruning_of(request, self.pruning, factor))

    async def awaited(self, request: Request, job: Job[Outcome]) -> RerankResult:
        """Await the result of a request whose :meth:`job` has not begun; otherwise as :meth:`arerank`."""
        with calling(self), reranking(self.name, [request]) as found:
            return found([self._result(request, await self._passes.awaited(job))])[0]

    def rerank_many(self, requests: Iterable[Request]) -> list[RerankResult]:
        """Rank the documents of several requests, which go through the layers together.

        Each result is the one that its request would have alone. Together they take less time where requests are
        small, because two passes then run at a time, and under a memory budget, because weights are read once for
        many. The errors are those of
        :meth:`rerank`; the message of a ``ValueError`` names the request's index.

        Args:
            requests: The requests, in any form that has an order. Those that fit go into a pass, the rest follows.

        Returns:
            The results in the order of the requests.
        """
        return self._rerank(checked_requests(requests, self._template.check_length))

    @for_a_caller
    def _rerank(self, requests: Sequence[Request]) -> list[RerankResult]:
        with reranking(self.name, requests) as found:
            outcomes = self._passes.compute([self.job(request) for request in requests])
            return found([self._result(*pair) for pair in zip(requests, outcomes, strict=True)])

    def _result(self, request: Request, outcome: Outcome) -> RerankResult:
        if self.recalibration is not None:
            self.recalibration.saw(request, [winner.index for winner in outcome.winners])
        return outcome.result(request.documents)

    @for_a_caller
    def score(self, pairs: Iterable[tuple[str, str]], *, show_progress: bool = False) -> list[float]:
        """Compute the relevance of each text to its query, by the full model.

        Args:
            pairs: Pairs ``(query, text)`` as a list, an array or a ``zip``. Queries may differ.
            show_progress: Whether to show a progress bar on standard error.

        Returns:
            Scores in the order of the pairs.

        Raises:
            ValueError: A pair is not two strings, or its query is empty; the message names its index.
            ScoreError, RuntimeError: See :meth:`rerank`.
        """
        asked = arguments.pairs("pairs", pairs)
        with scoring(self.name, len(asked)) as told:
            found = self._passes.compute(self.scorer.jobs_of_pairs(asked), show_progress=show_progress)
            told(sum(sum(outcome.trace.lengths) for outcome in found))
        return [score for outcome in found for score in outcome.trace.layers[-1].scores]

    def tail(self, text: str, tokens: int | None = None) -> str:
        """Return the last tokens of a text, or the whole text if it has no more tokens.

        Args:
            text: A query that may be too long, such as a conversation, whose last words say what it is about.
            tokens: Number of tokens to keep, 1 or more; None for half of the window.

        Raises:
            ValueError: ``tokens`` is below 1.
        """
        tokens = self.max_length // 2 if tokens is None else whole_number("tokens", tokens)
        return self._template.tail(text, tokens)

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
            ValueError: An argument is not usable, or there is too little text; the message names it.
            StorageError: The output cannot be written, or grating's cache has no room for the observations.
        """
        scorer = self.scorer
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

    def close(self) -> None:
        """Free weights, files and threads. Later calls raise ``RuntimeError``; calls in progress end normally."""
        self._passes.close()
        if self.recalibration is not None:
            self.recalibration.close()
        super().close()

    @property
    def scorer(self) -> Scorer:
        """The scorer, which computes the requests. Raises ``RuntimeError`` when the reranker has been closed."""
        return self._model()

    @property
    def device(self) -> torch.device:
        """The device that computes."""
        return self.scorer.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the layers' products. With int8, hidden states have another."""
        return self.scorer.model.products

    @property
    def max_length(self) -> int:
        """The most tokens of a query and a document together."""
        return self._template.window

    def count_tokens(self, text: str) -> int:
        """Count the tokens that the model's tokenizer makes of a text, without special tokens."""
        return self._template.count_tokens(text)

    def _start_recalibration(self) -> Recalibration[Scorer] | None:
        return start_recalibration(self.scorer, Scorer.full_scores, self.pruning, self.identity, self._sampling)
