"""A system in a process of its own, which answers one question at a time, and its memory as seen from outside.

Every benchmark compares whole processes. Either they take turns, so that a noisy machine is noisy for all of them
and those that wait compute nothing; or there is one after the other, where the page cache has to be empty.

While a system works, its memory is sampled every 5 ms by the process that asks; the kernel's high-water mark
catches what is shorter. Memory is counted over what the process held when the system called ``ready``.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import random
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import transformers
from rich.console import Console
from rich.progress import track
from transformers import AutoConfig
from transformers.utils import logging

SAMPLE_SECONDS = 0.005
PAUSE = 0.02  # seconds, in which the threads of the system before go to sleep

progress = Console(stderr=True)

Facts = dict[str, Any]

Ask = Callable[[Any], Facts]
"""Answers a question."""

Ready = Callable[[], None]
"""A system calls it when all is there that is not counted: the imports, the first stage, the tokenizer."""


@dataclass(frozen=True)
class System:
    """One of those that are compared.

    Attributes:
        name: What the table calls it.
        load: Loads it, given a :data:`Ready` and the settings. It imports what only this system needs.
        settings: Its keyword arguments.
    """

    name: str
    load: Callable[..., Ask]
    settings: Facts = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What came of a question.

    Attributes:
        facts: What the system says.
        seconds: Time that it took.
        read_mb: What the process had from the disk meanwhile, read-ahead included; None where nobody counts.
    """

    facts: Facts
    seconds: float
    read_mb: float | None


@dataclass(frozen=True)
class _Message:
    """What a process reports: its facts, and what it held at most since it was ready, in bytes."""

    kind: str
    facts: Facts = field(default_factory=dict)
    seconds: float = 0.0
    peak: int = 0


class Worker:
    """The process of a system, as seen from the one that asks.

    Attributes:
        system: The system.
        load_seconds: Time that loading took, from :data:`Ready` on.
        samples: Each with the seconds since it was ready, and the MB in memory over what it held then: in all, and
            without pages mapped from files.
    """

    def __init__(self, system: System) -> None:
        self.system = system
        self.samples: list[tuple[float, float, float]] = []
        self._computing: list[float] = []  # MB, sampled while it answered
        self._peak = 0
        context = multiprocessing.get_context("spawn")
        self._channel, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(system, theirs), daemon=True)
        self._process.start()
        theirs.close()  # the process holds the only other end now: when it dies, the pipe ends
        self._watched = psutil.Process(self._process.pid)
        self._before, self._started = (0, 0), 0.0

    def load(self) -> None:
        """Wait until the system is loaded.

        Raises:
            RuntimeError: It failed.
        """
        self._receive("ready")
        self._before, self._started = _memory(self._watched), time.monotonic()
        self._channel.send(None)
        self._receive("loaded")
        self.load_seconds = time.monotonic() - self._started

    def ask(self, question: Any) -> Answer:
        """Put a question to the system.

        Raises:
            RuntimeError: It failed.
        """
        read, first = _storage_read(self._watched), len(self.samples)
        self._channel.send(question)
        message = self._receive("answered")
        self._computing += [resident for _, resident, _ in self.samples[first:]]
        now = _storage_read(self._watched)
        return Answer(message.facts, message.seconds, None if read is None or now is None else (now - read) / 1e6)

    @property
    def peak_mb(self) -> float:
        """Most MB since it was ready, as the kernel or the samples saw them."""
        return max((self._peak - self._before[0]) / 1e6, *(resident for _, resident, _ in self.samples))

    @property
    def peak_private_mb(self) -> float:
        """Most MB that are not mapped from files: mapped pages can be taken back by the system."""
        return max(private for _, _, private in self.samples)

    @property
    def mean_mb(self) -> float:
        """Mean of the MB while it answered."""
        return float(np.mean(self._computing))

    def curve(self, points: int = 200) -> list[tuple[float, float]]:
        """Return memory over time in few points: seconds, and the most MB of the stretch that begins there."""
        seconds, resident, _ = np.array(self.samples).T
        starts = np.unique(np.linspace(0, len(seconds), points, endpoint=False).astype(int))
        most = np.maximum.reduceat(resident, starts)
        return list(zip(seconds[starts].round(2).tolist(), most.round(1).tolist(), strict=True))

    def close(self) -> None:
        """End the process."""
        self._channel.close()
        self._process.join()

    def _receive(self, kind: str) -> _Message:
        try:
            while not self._channel.poll(SAMPLE_SECONDS):
                if self._started:
                    self._sample()
            message: _Message = self._channel.recv()
        except EOFError:
            self._process.join()
            message = _Message("failed", {"reason": f"died with exit code {self._process.exitcode}"})
        if message.kind != kind:
            raise RuntimeError(f"{self.system.name} is {message.kind}, not {kind}: {message.facts.get('reason')}")
        if self._started:
            self._sample()
        self._peak = max(self._peak, message.peak)
        return message

    def _sample(self) -> None:
        with suppress(psutil.Error):  # it has just ended: the channel will say why
            resident, private = _memory(self._watched)
            seconds = time.monotonic() - self._started
            first, own = self._before
            self.samples.append((seconds, (resident - first) / 1e6, (private - own) / 1e6))


@contextmanager
def loaded(systems: Sequence[System]) -> Iterator[list[Worker]]:
    """Load systems one after the other; all are there together, and end together."""
    with ExitStack() as stack:
        workers = []
        for system in systems:
            with progress.status(f"{system.name}: loading"):
                workers.append(Worker(system))
                stack.callback(workers[-1].close)
                workers[-1].load()
        yield workers


def take_turns(
    workers: Sequence[Worker], questions: Sequence[Any], *, rounds: int, timed: int | None = None, title: str = ""
) -> dict[str, list[list[Answer]]]:
    """Put every question to every system, in a new order each time.

    Args:
        workers: The systems, loaded. Each answers the first question once before, to warm up.
        questions: What is asked.
        rounds: How often.
        timed: How many of the questions come in every round; the others come in the first only. None for all.
        title: What the progress bar says.

    Returns:
        The answers of each system, by question and round.
    """
    order, turns = random.Random(0), list(workers)
    for worker in turns:
        worker.ask(questions[0])
    answers: dict[str, list[list[Answer]]] = {worker.system.name: [[] for _ in questions] for worker in workers}
    again = len(questions) if timed is None else min(timed, len(questions))
    numbers = [*range(len(questions)), *(rounds - 1) * [*range(again)]]
    for number in track(numbers, title, console=progress):
        order.shuffle(turns)
        for worker in turns:
            time.sleep(PAUSE)
            answers[worker.system.name][number].append(worker.ask(questions[number]))
    return answers


def forget_pages(directory: Path) -> None:
    """Drop a checkpoint from the page cache, unless somebody has it mapped: the next read is from the disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in directory.glob("*.safetensors"):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)  # pages not yet written would stay
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


# What the process does.


def import_all(directory: Path) -> None:
    """Import the code of a model, which transformers does on first use, and return what is not in use."""
    getattr(transformers, AutoConfig.from_pretrained(directory, trust_remote_code=False).architectures[0])
    return_memory()


@contextmanager
def ready_after(place: str, ready: Ready) -> Iterator[None]:
    """Be ready when grating has loaded its tokenizer, before it reads weights.

    What loading the tokenizer leaves half empty in the allocator counts as the tokenizer's, as for every system.

    Args:
        place: The function or class that loads the tokenizer, as ``module.name``.
        ready: See :data:`Ready`.
    """
    load = resolve_name(place)

    def load_and_tell(*arguments: Any, **options: Any) -> Any:
        tokenizer = load(*arguments, **options)
        ready()
        return tokenizer

    with patch(place, load_and_tell):
        yield


def _work(system: System, channel: Connection) -> None:
    """Load, then answer until nobody asks any more."""
    warnings.simplefilter("ignore")  # what a package says on import would be said by every process
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]

    known = False

    def ready() -> None:
        nonlocal known
        channel.send(_Message("ready"))
        channel.recv()  # the other process looks at the memory
        known = _reset_high_water()

    def answer(kind: str, facts: Facts, seconds: float) -> None:
        channel.send(_Message(kind, facts, seconds, _high_water() if known else 0))

    try:
        ask = system.load(ready, **system.settings)
        answer("loaded", {}, 0)
        while True:
            question = channel.recv()
            started = time.perf_counter()
            facts = ask(question)
            answer("answered", facts, time.perf_counter() - started)
    except (EOFError, BrokenPipeError):  # nobody asks any more
        return
    except Exception:
        channel.send(_Message("failed", {"reason": traceback.format_exc()}))


def return_memory() -> None:
    """Give what is not in use back to the system."""
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # glibc has it
        trim(0)


def _memory(process: psutil.Process) -> tuple[int, int]:
    """Return the resident bytes of a process, and those of them that are not mapped from a file, if known."""
    memory = process.memory_info()
    return memory.rss, memory.rss - getattr(memory, "shared", 0)


def _reset_high_water() -> bool:
    """Let the kernel forget the most memory this process had so far, and tell whether it can."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _high_water() -> int:
    """Return the most bytes this process had in memory since the kernel last forgot."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def _storage_read(process: psutil.Process) -> int | None:
    """Return the bytes that a process has had from the disk, where the system counts them."""
    return process.io_counters().read_bytes if hasattr(process, "io_counters") else None
