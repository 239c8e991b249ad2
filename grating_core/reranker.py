"""The reranker: the one class that most people touch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from threading import Event
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, get_args

import torch

from grating_core import arguments
from grating_core.arguments import check_query, is_number, whole_number
from grating_core.engine.attention import PACKED_ATTENTION
from grating_core.engine.scorer import Scorer
from grating_core.errors import UnsupportedModelError
from grating_core.files.places import expanded
from grating_core.forking import Threads, computed
from grating_core.lens.calibrate import calibrate
from grating_core.lens.pruning import ByLens, check_share, plan_pruning
from grating_core.lens.recalibrate import Logged, Recalibration, start_recalibration
from grating_core.lens.state import Sampling
from grating_core.lens.store import CalibratedLens, find_lens, lens_directory, open_lens, warn_once
from grating_core.lifetime import Loaded, closed_on_error, find_or_load, remembering
from grating_core.memory.meter import resident_memory
from grating_core.memory.plan import MemoryPlan, make_plan, parse_budget
from grating_core.models.adapter import find_adapter
from grating_core.models.directory import find_model
from grating_core.models.gguf import GgufModel, is_gguf
from grating_core.models.hub import Hub
from grating_core.models.identity import fingerprint
from grating_core.models.loading import StoredCrossEncoder
from grating_core.models.placement import choose_device, choose_dtype
from grating_core.pruning import ClusterPolicy, Guarantee, Off, PruningPolicy
from grating_core.results import RankedDocument, RerankResult
from grating_core.text.pairs import load_template
from grating_core.text.prompts import Prompt, find_prompt, usual_length
from grating_core.text.windows import check_long_documents, find_window

_CALLS = 4  # of arerank at a time, where they need not take turns
_TARGET = 0.98

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


class Reranker(Loaded[Scorer]):
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
    @remembering
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = "auto",
        memory_budget: str | int | None = None,
        pruning: str | PruningPolicy | None = "auto",
        target: float | None = _TARGET,
        guarantee: Guarantee | None = "share",
        lens: str | Path | None = None,
        recalibrate: float | None = 0.0,
        max_length: int | None = None,
        long_documents: arguments.LongDocuments | None = "truncate",
        template: Prompt | str | None = None,
        instruction: str | None = None,
        adapter: str | Path | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool | None = False,
        show_progress: bool = False,
    ) -> Reranker:
        """Load a cross-encoder.

        Args:
            model: A hub id such as ``"cross-encoder/ms-marco-MiniLM-L12-v2"`` or ``"Qwen/Qwen3-Reranker-0.6B"``,
                a local directory in Hugging Face layout with safetensors weights, a language model's GGUF file, or
                ``"bundled:ms-marco-minilm-l12"``.
            device: ``"cpu"``, ``"cuda"`` or ``"mps"``; None takes the best that is there.
            dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``: bfloat16 where the processor
                has instructions for it, else float32.
            memory_budget: How much memory loading and reranking may take beyond what importing the packages and
                the tokenizer takes: bytes, or a size such as ``"300MB"``. What does not fit is read from disk
                while it computes (layers, embedding rows) or kept there (hidden states, in grating's cache
                directory); scores stay the same. Calls from several threads then take turns. On CUDA it holds
                for the memory of the device. None keeps everything resident and sets no bound.
            pruning: ``"auto"``: by the lens that belongs to this model, see :meth:`calibrate`; without a lens
                nothing is pruned. Or ``"cluster"``, ``"off"``, or a policy object.
            target: What a lens promises, for requests like those it was calibrated on: the share of the full
                model's top K that is kept, on average. More prunes less. Also what ``recalibrate`` aims at.
            guarantee: ``"share"``, or ``"set"``: the target is the probability that the whole top K is kept.
            lens: A directory with the lens to use; None for the one calibrated here, or come with the package.
            recalibrate: Share of requests, from 0 (off) to 1, that are computed again without pruning when nobody
                has called for a second, to see what was lost. The margins of the lens, or the threshold of
                ``"cluster"``, then move until ``target`` is what is kept. Without a lens ``"auto"`` has nothing to
                move, and this begins with :meth:`calibrate`. The factor they are multiplied by is kept in
                grating's cache directory, texts never are.
            max_length: Most tokens of a query and document together, with all that the model wants around them;
                None for what the model was made for, at most 8,192 with decoders.
            long_documents: What to do with a document that does not fit: ``"truncate"`` cuts its end,
                ``"windows"`` divides it into overlapping windows, of which the best gives its score.
            template: How a decoder is asked: a :class:`Prompt`, or the name of an official one. None for the
                model's own: rerankers with an official format are known by their names, other language models are
                asked through their chat templates. Encoders join the two texts by their tokenizer.
            instruction: What to judge by, for templates that have a slot for it; None for their own words.
            adapter: A LoRA adapter as PEFT saves it, a directory or hub id, which is merged into the weights when
                they are read.
            revision: Branch, tag or commit of the model on the hub; None for the newest. This and the next three
                are ignored for a model that is not on the hub; an adapter takes all but the revision.
            token: What proves to the hub who asks; None or True for the one of ``hf auth login`` or ``HF_TOKEN``,
                False for none.
            cache_dir: Where the hub's files are kept; None for the hub's own place.
            local_files_only: Use what is kept there already, without asking the hub.
            show_progress: Show progress bars while fetching or converting.

        Raises:
            ModelNotFoundError: The name leads to no usable weights.
            UnsupportedModelError: The weights are of a kind that grating does not run.
            BudgetError: The memory budget is too small; the message states the smallest that works. It is a
                ``ValueError`` as well.
            FileError: There is no lens in that directory, it is damaged, or it is for other weights.
            ValueError: An argument is not usable; the message names it. None is as if it were not given, for all.
        """
        dtype = "auto" if dtype is None else dtype
        pruning = "auto" if pruning is None else pruning
        target = _TARGET if target is None else target
        guarantee = "share" if guarantee is None else guarantee
        recalibrate = 0.0 if recalibrate is None else recalibrate
        long_documents = "truncate" if long_documents is None else long_documents
        if max_length is not None:
            max_length = whole_number("max_length", max_length)
        budget = None if memory_budget is None else _find_budget(memory_budget, model)
        chosen = _find_policy(pruning)
        _check_promise(target, guarantee, lens, pruning)
        check_share(recalibrate, pruning)
        check_long_documents(long_documents)
        if instruction is not None and not isinstance(instruction, str):
            raise ValueError(f"instruction={instruction!r} must be a string or None")
        stored = _open(
            str(model),
            device,
            dtype,
            hub=Hub(revision, token, cache_dir, local_files_only),
            adapter=adapter,
            lasting=budget is not None,
            show_progress=show_progress,
        )
        with closed_on_error(stored):
            directory = stored.directory
            prompt = find_prompt(template, str(model), directory, stored.family)
            window = find_window(directory, stored.window, max_length, usual_length(prompt, stored.family))
            plan = None if budget is None else make_plan(stored.sizes(window), budget)
            identity = fingerprint(directory, stored.adapter, prompt)
            policy: PruningPolicy | ByLens
            if chosen is None:
                calibrated = (
                    find_lens(identity, stored.shape)
                    if lens is None
                    else open_lens(expanded(lens), stored.shape, identity)
                )
                policy = ByLens(float(target), guarantee, calibrated and calibrated.to(stored.device))
            else:
                policy = chosen
            # The tokenizer first: what loading it takes for a moment is then free for the weights.
            before = resident_memory()
            encoder = load_template(
                directory,
                window,
                prompt=prompt,
                instruction=instruction,
                asks=stored.family.asks,
                long_documents=long_documents,
                rows=stored.vocabulary,
            )
            if plan is not None:
                plan = replace(plan, tokenizer=max(0, resident_memory() - before))
            return cls(
                Scorer(stored.load(plan, encoder.answers), encoder, plan),
                model_path=directory,
                identity=identity,
                pruning=policy,
                sampling=Sampling(float(recalibrate), float(target), guarantee) if recalibrate else None,
            )

    @classmethod
    def shared(cls, model: str | Path, **settings: Any) -> Reranker:
        """The process's one reranker with this model and these settings, loaded if nobody holds it yet.

        It is freed when the last holder lets go of it. Do not close it: others may be using it.

        Args:
            model: As in :meth:`from_pretrained`.
            settings: As in :meth:`from_pretrained`; a policy object must be hashable.

        Raises:
            ValueError: The policy object is not hashable; and as :meth:`from_pretrained` does.
        """
        settings = arguments.given(settings)
        if not isinstance(settings.get("pruning"), Hashable):
            raise ValueError(
                f"pruning={settings['pruning']!r} is not hashable, so it cannot be told whether it is shared"
            )
        found: Reranker = find_or_load(cls, model, settings)
        return found

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
            target=self.pruning.target if isinstance(self.pruning, ByLens) else _TARGET,
            directory=place,
            seed=seed,
            show_progress=show_progress,
        )
        if isinstance(self.pruning, ByLens):
            if output is not None and self._remake is not None:
                self._remake = partial(self._remake, lens=str(place.absolute()))
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


def plan_memory(
    model: str | Path,
    memory_budget: str | int,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = "auto",
    max_length: int | None = None,
    template: Prompt | str | None = None,
    adapter: str | Path | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool | None = False,
    show_progress: bool = False,
) -> tuple[Path, int, MemoryPlan]:
    """What :meth:`Reranker.from_pretrained` would do with a memory budget; no weights are read.

    The arguments and errors are those of :meth:`Reranker.from_pretrained`.

    Returns:
        The model's directory, the most tokens of a pair, and the plan.
    """
    budget = _find_budget(memory_budget, model)
    stored = _open(
        str(model),
        device,
        "auto" if dtype is None else dtype,
        hub=Hub(revision, token, cache_dir, local_files_only),
        adapter=adapter,
        lasting=False,
        show_progress=show_progress,
    )
    with closing(stored):
        prompt = find_prompt(template, str(model), stored.directory, stored.family)
        window = find_window(stored.directory, stored.window, max_length, usual_length(prompt, stored.family))
        return stored.directory, window, make_plan(stored.sizes(window), budget)


def _open(
    model: str,
    device: str | torch.device | None,
    dtype: str | torch.dtype,
    *,
    hub: Hub,
    adapter: str | Path | None,
    lasting: bool,
    show_progress: bool,
) -> StoredCrossEncoder | GgufModel:
    chosen_device = choose_device(device)
    chosen_dtype, _ = choose_dtype(dtype, chosen_device)
    directory = find_model(model, hub=hub, show_progress=show_progress)
    how: dict[str, Any] = {
        "device": chosen_device,
        "dtype": chosen_dtype,
        "attention": PACKED_ATTENTION,
        "adapter": None if adapter is None else find_adapter(str(adapter), hub=hub, show_progress=show_progress),
    }
    if is_gguf(directory):
        return GgufModel(directory, **how)
    return StoredCrossEncoder(directory, **how, lasting=lasting)


def _find_budget(memory_budget: str | int, model: str | Path) -> int:
    budget = parse_budget(memory_budget)
    if is_gguf(expanded(model)):
        raise UnsupportedModelError(
            f"memory_budget={memory_budget!r} cannot be kept with {model}: a GGUF file is unpacked as a whole. "
            f"Leave the budget out, or take the model as safetensors"
        )
    return budget


def _find_policy(pruning: str | PruningPolicy) -> PruningPolicy | None:
    """The policy that the user chose; None to prune by the model's lens."""
    if not isinstance(pruning, str) and isinstance(pruning, PruningPolicy):
        return pruning
    if pruning == "auto":
        return None
    if pruning == "cluster":
        return ClusterPolicy()
    if pruning == "off":
        return Off()
    raise ValueError(
        f"pruning={pruning!r} is unknown; use 'auto', 'cluster', 'off', or an object with a route method"
    )


def _check_promise(target: float, guarantee: str, lens: object, pruning: object) -> None:
    if not is_number(target) or not 0 < target < 1:
        raise ValueError(f"target={target!r} must be a number between 0 and 1, such as 0.98")
    if guarantee not in get_args(Guarantee):
        raise ValueError(f"guarantee={guarantee!r} must be 'share' or 'set'")
    if lens is not None and pruning != "auto":
        raise ValueError(f"lens={str(lens)!r} and pruning={pruning!r} exclude each other: a lens takes 'auto'")
