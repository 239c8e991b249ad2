"""The reranker is the one class that most people use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from grating_core import arguments
from grating_core.arguments import Guarantee, LongDocuments, Scores, whole_number
from grating_core.calibrating import Calibrated
from grating_core.engine.job import Job
from grating_core.engine.one_pass import Outcome
from grating_core.engine.passes import Passes
from grating_core.engine.scorer import Scorer
from grating_core.forking import Threads
from grating_core.lens.probability import Probability, logistic
from grating_core.lens.pruning import ByLens, pruning_of
from grating_core.lens.recalibrate import calling, for_a_caller
from grating_core.lens.state import Sampling
from grating_core.lifetime import closed_on_error
from grating_core.opening.rerankers import open_reranker
from grating_core.pruning import PruningPolicy
from grating_core.requests import Request, checked_requests
from grating_core.results import RerankResult
from grating_core.settings import Engine, PruningName, RerankSettings
from grating_core.telemetry import reranking, scoring
from grating_core.text.prompts import Prompt


class Reranker(Calibrated):
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
        probability: Probability = logistic,
    ) -> None:
        self._loaded: Scorer | None = scorer
        self._template = scorer.template
        self._turn = scorer.turn
        self._calls = Threads(1, "grating-rerank")
        self._passes = Passes(scorer.run, scorer.turn, self._calls, scorer.pass_tokens, scorer.lanes)
        self.plan = scorer.plan
        """The plan of the memory budget; None without a budget."""
        self.model_path = model_path
        """The local directory that the weights were read from."""
        super().__init__(identity, pruning, sampling, probability)

    @classmethod
    def from_pretrained(  # noqa: D417 - the settings describe the other arguments
        cls,
        model: str | Path,
        *,
        device: str | torch.device | None = RerankSettings.device,
        dtype: str | torch.dtype | None = RerankSettings.dtype,
        memory_budget: str | int | None = RerankSettings.memory_budget,
        engine: Engine | None = RerankSettings.engine,
        pruning: PruningName | PruningPolicy | None = RerankSettings.pruning,
        target: float | None = RerankSettings.target,
        guarantee: Guarantee | None = RerankSettings.guarantee,
        lens: str | Path | None = RerankSettings.lens,
        recalibrate: float | None = RerankSettings.recalibrate,
        max_length: int | None = RerankSettings.max_length,
        long_documents: LongDocuments | None = RerankSettings.long_documents,
        template: Prompt | str | None = RerankSettings.template,
        instruction: str | None = RerankSettings.instruction,
        cutoff_layers: int | None = RerankSettings.cutoff_layers,
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
            return cls(opened.load(), opened.directory, opened.identity, pruning, sampling, opened.probability)

    def rerank(
        self,
        query: str,
        documents: Iterable[str],
        top_k: int = 10,
        *,
        scores: Scores = "exact",
        score_threshold: float | None = None,
        raw_scores: bool = False,
        deadline: float | None = None,
        highlights: bool = False,
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
            score_threshold: The least probability of a document that is returned, from 0 to 1. Fewer than
                ``top_k`` may come back, or none: "nothing here is relevant" is an answer. None leaves none out. A
                threshold needs exact scores, because the level of an estimate may be off.
            raw_scores: Whether the threshold is a raw score, such as -3.5, and no probability.
            deadline: Seconds for the whole call; None takes as long as it takes. When time runs short, more
                documents are dropped, and sure winners stop early. When it is over, the best ranking so far comes
                back, with estimates marked and ``trace.cut_short`` true. Without a lens, the first documents are
                computed that can be. What has no estimate comes last, with the lowest score before it, or 0.
            highlights: Whether to find the sentences of each returned document that carried its score.

        Returns:
            The top ``min(top_k, N)`` documents, best first, without those below the threshold; and the trace.

        Raises:
            ValueError: An argument is not usable; the message names it. Raised before any computing.
            ScoreError: The model gave a score that is not a finite number.
            RuntimeError: The reranker has been closed.
        """
        wanted = {
            "score_threshold": score_threshold,
            "raw_scores": raw_scores,
            "deadline": deadline,
            "highlights": highlights,
        }
        return self._rerank([Request.of(query, documents, top_k, scores=scores, **wanted)])[0]

    async def arerank(
        self,
        query: str,
        documents: Iterable[str],
        top_k: int = 10,
        *,
        scores: Scores = "exact",
        score_threshold: float | None = None,
        raw_scores: bool = False,
        deadline: float | None = None,
        highlights: bool = False,
    ) -> RerankResult:
        """Await what :meth:`rerank` returns. Waiting holds no thread; cancelling the task ends its computing."""
        wanted = {
            "score_threshold": score_threshold,
            "raw_scores": raw_scores,
            "deadline": deadline,
            "highlights": highlights,
        }
        request = Request.of(query, documents, top_k, scores=scores, **wanted)
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
        small, because two passes run at a time, and under a memory budget, because weights are read once for all.
        The errors are those of :meth:`rerank`; a ``ValueError`` names the request's index.

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
        if self.recalibration is not None and not outcome.trace.cut_short:
            self.recalibration.saw(request, [winner.index for winner in outcome.winners])
        return outcome.result(request, self.probability)

    @for_a_caller
    def score(self, pairs: Iterable[tuple[str, str]], *, show_progress: bool = False) -> list[float]:
        """Compute the relevance of each text to its query, by the full model.

        Args:
            pairs: Pairs ``(query, text)`` as a list, an array or a ``zip``. Queries may differ.
            show_progress: Whether to show a progress bar on standard error.

        Returns:
            Raw scores in the order of the pairs. :meth:`probability` turns one into a probability.

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

    def close(self) -> None:
        """Free weights, files and threads. Later calls raise ``RuntimeError``; calls in progress end normally."""
        self._passes.close()
        super().close()

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
