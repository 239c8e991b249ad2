"""One system of an application in a process of its own, which answers questions one at a time.

All systems of an application are alive together, so that they can take turns; those that wait compute nothing.
"""

from __future__ import annotations

import multiprocessing
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Literal, TypeVar

import numpy as np
import psutil
from numpy.typing import NDArray
from transformers import AutoTokenizer
from transformers.utils import logging

from benchmarks.watcher import high_water, reset_high_water, return_memory


@dataclass(frozen=True)
class System:
    """What follows the first stage.

    Attributes:
        name: What the table calls it.
        kind: No reranker at all, the usual one of the framework, or grating's.
        settings: Keyword arguments for its class, or for :func:`benchmarks.applications.langchain.cross_encoder`.
    """

    name: str
    kind: Literal["none", "usual", "grating"]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Question:
    """What a user asks.

    Attributes:
        id: What the collection calls it.
        text: What is asked.
        place: Where the answer is looked for, if not in all the texts: the name of a conversation, or a long text.
    """

    id: str
    text: str
    place: str = ""


@dataclass(frozen=True)
class Answer:
    """What a user gets.

    Attributes:
        kept: What was selected, best first: ids of texts, or where passages begin and end.
        candidates: What it was selected from: ids of texts.
        retrieval: Seconds of the first stage.
        reranking: Seconds of what follows.
    """

    kept: list[Any]
    candidates: list[str]
    retrieval: float
    reranking: float


Ask = Callable[[Question], Answer]
"""Answers a question."""

Attach = Callable[[System], Ask]
"""Loads what follows the first stage, which is there."""


@dataclass(frozen=True)
class Corpus:
    """What a first stage searches.

    Attributes:
        texts: By their ids.
        vectors: float32 ``[T, D]``: their embeddings.
        embedder: Directory of the model that made them.
    """

    texts: dict[str, str]
    vectors: NDArray[np.float32]
    embedder: Path


@dataclass(frozen=True)
class Job:
    """What every system of an application is given.

    Attributes:
        build: The function that loads the first stage, given this job. It is named, ``module:function``, so that
            only the framework that is used is imported.
        model: Directory of the reranker.
        questions: What is asked.
        corpus: What the first stage searches, if there is one.
    """

    build: str
    model: Path
    questions: list[Question]
    corpus: Corpus | None = None


@dataclass(frozen=True)
class Loaded:
    """A worker is ready; it held so many bytes before its reranker was loaded."""

    before: int


@dataclass(frozen=True)
class Answered:
    """An answer, and the most bytes in memory since the reranker was to be loaded, where the kernel tells."""

    answer: Answer
    peak: int | None


@dataclass(frozen=True)
class Failed:
    """What went wrong in a worker."""

    reason: str


Message = TypeVar("Message")


class Worker:
    """The system's process, as seen from the one that asks."""

    def __init__(self, job: Job, system: System) -> None:
        self.system = system
        context = multiprocessing.get_context("spawn")
        self._channel, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(job, system, theirs), daemon=True)
        self._process.start()
        theirs.close()  # the worker holds the only other end now: when it dies, the pipe ends

    def wait(self) -> Loaded:
        """Wait until everything is loaded."""
        return self._receive(Loaded)

    def ask(self, number: int) -> Answered:
        """Put a question of the job to the system.

        Args:
            number: Of the question.
        """
        self._channel.send(number)
        return self._receive(Answered)

    def close(self) -> None:
        """End the process."""
        self._channel.close()
        self._process.join()

    def _receive(self, kind: type[Message]) -> Message:
        try:
            received = self._channel.recv()
        except EOFError:
            self._process.join()
            received = Failed(f"died with exit code {self._process.exitcode}")
        if isinstance(received, Failed):
            raise RuntimeError(f"{self.system.name}: {received.reason}")
        assert isinstance(received, kind)
        return received


def _work(job: Job, system: System, channel: Connection) -> None:
    """What the process does: load, then answer until nobody asks any more."""
    warnings.simplefilter("ignore")  # what a package says on import would be said by every process
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        attach: Attach = resolve_name(job.build)(job)
        return_memory()
        # The tokenizer counts as there before: what this one leaves is free for the system's own.
        tokenizer = AutoTokenizer.from_pretrained(job.model, trust_remote_code=False)
        before, known = psutil.Process().memory_info().rss, reset_high_water()
        del tokenizer
        ask = attach(system)
        channel.send(Loaded(before))
        while True:
            answer = ask(job.questions[channel.recv()])
            channel.send(Answered(answer, high_water() if known else None))
    except (EOFError, BrokenPipeError):  # nobody asks any more
        return
    except Exception:
        channel.send(Failed(traceback.format_exc()))
