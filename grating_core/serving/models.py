"""The server has several models by name, each with a queue of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from time import perf_counter
from typing import Any, Self

from grating_core.engine.job import Job
from grating_core.engine.one_pass import Outcome
from grating_core.errors import FileError, ScoreError, StorageError
from grating_core.forking import run_in_thread
from grating_core.requests import Request
from grating_core.reranker import Reranker
from grating_core.results import RerankResult
from grating_core.serving.admission import Queue
from grating_core.serving.errors import Refused, invalid, too_large
from grating_core.serving.settings import ServeSettings
from grating_core.settings import RerankSettings

_CHARACTERS = 4  # of a token, about; what a request takes in the queue until its tokens are counted
_KEPT = 32  # so many characters count as a token at least: a text waits in memory, however little is read of it


class ServedModel:
    """A served model ranks requests that wait for it together.

    Args:
        name: The name that clients ask for.
        reranker: The reranker, which is closed elsewhere.
        server: The server's settings, of which this takes the limits.
    """

    def __init__(self, name: str, reranker: Reranker, server: ServeSettings) -> None:
        self.name = name
        self.reranker = reranker
        self.queue = Queue(server.queue_tokens)
        self._most_tokens = server.max_tokens

    async def ranked(self, requests: Sequence[Request], field: str, *, cuts: bool = True) -> list[RerankResult]:
        """Rank the documents of requests. They share passes with whatever else waits for the model.

        When the task is cancelled, nothing more is computed for it.

        Args:
            requests: The requests.
            field: The field of the documents, for messages.
            cuts: Whether a long document is cut. Otherwise it is refused.

        Raises:
            Refused: The queue is full, a limit is exceeded, the query is too long, or the model cannot compute.
        """
        came = perf_counter()
        with self.queue.place() as place:
            place.take(sum(map(self._estimate, requests)))
            try:
                jobs = await run_in_thread(self._encoded, requests, came)
            except ValueError as error:  # a query that fills the window
                raise invalid(str(error)) from error
            tokens = self._checked_tokens(jobs, field, cuts=cuts)
            place.take(max(tokens, sum(map(_characters, requests)) // _KEPT))
            try:
                return await _all(self.reranker, requests, jobs)
            except (FileError, StorageError) as error:
                raise Refused(503, "unhealthy", "The model's files cannot be used at the moment.") from error
            except ScoreError as error:
                raise Refused(424, "backend", "The model gave a score that is not a finite number.") from error

    def _encoded(self, requests: Sequence[Request], came: float) -> list[Job[Outcome]]:
        """Return the jobs of the requests, which came some time ago, with their tokens. This takes long."""
        jobs = [self.reranker.job(_since(came, request.checked())) for request in requests]
        for job in jobs:
            _ = job.tokens
        return jobs

    def _estimate(self, request: Request) -> int:
        """Estimate the tokens of a request, as it takes them in the queue."""
        window, query = self.reranker.max_length, len(request.query)
        tokens = sum(min(window, (query + len(text)) // _CHARACTERS + 3) for text in request.documents)
        return max(tokens, _characters(request) // _KEPT)

    def _checked_tokens(self, jobs: Sequence[Job[Outcome]], field: str, *, cuts: bool) -> int:
        """Return the tokens of all jobs, if they may be computed."""
        tokens = sum(job.tokens for job in jobs)
        if tokens > self._most_tokens:
            raise too_large(
                f"{field} and query have {tokens} tokens together, over all documents; this server takes "
                f"{self._most_tokens}. Send fewer or shorter documents"
            )
        if not cuts:
            windows = [found for job in jobs for found in job.encoded]
            for index, found in enumerate(windows):
                if found[0].truncated:
                    raise too_large(
                        f"{field}[{index}] does not fit with the query into {self.reranker.max_length} tokens; "
                        f"send truncate: true to have it cut"
                    )
        return tokens


def _since(came: float, request: Request) -> Request:
    """Return the request with as much time as is left of its deadline."""
    if request.deadline is None:
        return request
    return replace(request, deadline=max(1e-6, request.deadline - (perf_counter() - came)))


def _characters(request: Request) -> int:
    return len(request.query) + sum(map(len, request.documents))


async def _all(
    reranker: Reranker, requests: Sequence[Request], jobs: Sequence[Job[Outcome]]
) -> list[RerankResult]:
    """Await all jobs. If one fails, the others are given up."""
    calls = [
        asyncio.ensure_future(reranker.awaited(request, job)) for request, job in zip(requests, jobs, strict=True)
    ]
    try:
        return await asyncio.gather(*calls)
    finally:
        for call in calls:
            call.cancel()


class ServedModels:
    """This class holds the models that clients may ask for. The first is the default."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._models = {model.name: model for model in models}
        if len(self._models) < len(models):
            raise ValueError("two models have the same name; give one of them another, as in NAME=MODEL")

    @classmethod
    def open(cls, settings: RerankSettings, server: ServeSettings) -> Self:
        """Load all models.

        Raises:
            ValueError: Two models have the same name. Other errors are those of ``Reranker.from_pretrained``.
        """
        named = [(server.name, settings)]
        for one in server.also:
            name, _, model = one.rpartition("=")
            named.append((name, _for_another(settings, model)))
        with ExitStack() as opened:
            models = [
                ServedModel(name or one.name, opened.enter_context(Reranker.open(one)), server)
                for name, one in named
            ]
            found = cls(models)
            opened.pop_all()
            return found

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models.values())

    @property
    def default(self) -> ServedModel:
        """The model of requests that name none."""
        return next(iter(self))

    def named(self, name: str | None) -> ServedModel:
        """Return the model of a name, the default for None.

        Raises:
            Refused: No model has the name.
        """
        found = self.default if name is None else self._models.get(name)
        if found is None:
            names = ", ".join(self._models)
            raise Refused(404, "not_found", f"model is none of those that are served here: {names}")
        return found

    def close(self) -> None:
        """Close all models. What was admitted is computed first."""
        for model in self:
            model.reranker.close()


def _for_another(settings: RerankSettings, model: str) -> RerankSettings:
    """Return the settings for another model, without those that fit only the first."""
    own = ("lens", "adapter", "revision", "template", "instruction", "cutoff_layers")
    without: dict[str, Any] = dict.fromkeys(own)
    return replace(settings, model=model, **without)
