"""One system in a process of its own, and its memory as seen from outside.

The process that watches samples the resident memory of the other every 5 ms; the kernel's high-water mark catches
what is shorter.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import sys
import time
import traceback
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import transformers
from transformers import AutoConfig

SAMPLE_SECONDS = 0.005

Request = tuple[str, list[str]]
Facts = dict[str, Any]
Rank = Callable[[Any], Facts]


@dataclass(frozen=True)
class System:
    """Something that reranks, or generates.

    Attributes:
        name: What the table calls it.
        load: Loads it, given the model's directory, something to call before any weight is read, and the settings.
        settings: Its keyword arguments.
        budget: The bytes it was allowed, if it was told.
    """

    name: str
    load: Callable[..., tuple[Rank, Facts]]
    settings: dict[str, Any]
    budget: int | None = None


@dataclass(frozen=True)
class Job:
    """What every system is given.

    Attributes:
        directory: The model.
        requests: Queries with their candidates, or prompts.
        rounds: How many requests are made; they come round again when there are fewer.
        warm: Leave the page cache alone.
    """

    directory: Path
    requests: Sequence[Any]
    rounds: int
    warm: bool


@dataclass(frozen=True)
class Mark:
    """A moment in a worker's life.

    Attributes:
        name: ``imported``, ``tokenizer`` (loaded), ``loaded``, ``begin`` or ``end`` of a request, or ``failed``.
        seconds: On the monotonic clock, which all processes share.
        resident: Bytes in memory.
        private: Those of them that are not mapped from a file, where the system tells.
        peak: Most bytes in memory since the mark before, where the kernel tells.
        facts: What else is known at this moment.
    """

    name: str
    seconds: float
    resident: int
    private: int | None
    peak: int | None
    facts: Facts


@dataclass
class Run:
    """What was seen of one system: its marks, and samples of its memory in bytes."""

    system: System
    marks: list[Mark] = field(default_factory=list)
    seconds: array[float] = field(default_factory=lambda: array("d"))
    resident: array[float] = field(default_factory=lambda: array("d"))
    private: array[float] = field(default_factory=lambda: array("d"))
    failure: str = ""

    def all(self, name: str) -> list[Mark]:
        """The marks of that name."""
        return [mark for mark in self.marks if mark.name == name]

    def samples(self, start: Mark, end: Mark, values: Sequence[float]) -> np.ndarray:
        """What was sampled between two marks, and a bit beyond so that there is something."""
        first, last = np.searchsorted(self.seconds, [start.seconds, end.seconds])
        return np.asarray(values)[first : last + 1]

    def peak(self, start: Mark, end: Mark) -> float:
        """Most bytes in memory between two marks, as sampled or as the kernel saw it."""
        marked = [mark.peak or mark.resident for mark in self.marks if start.seconds < mark.seconds <= end.seconds]
        return float(max([*marked, *self.samples(start, end, self.resident)]))


def watch(system: System, job: Job, on_mark: Callable[[Mark], None] = lambda mark: None) -> Run:
    """Run a system in a fresh process and sample its memory until it is done.

    Args:
        system: What is run.
        job: What it is given.
        on_mark: Called with each mark as it comes.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(system, job, sender), daemon=True)
    process.start()
    sender.close()  # the worker holds the only other end now: when it dies, the pipe ends
    watched = psutil.Process(process.pid)
    run = Run(system)
    try:
        while True:
            if receiver.poll(SAMPLE_SECONDS):
                run.marks.append(receiver.recv())
                on_mark(run.marks[-1])
            resident, private = _memory(watched)
            run.seconds.append(time.monotonic())
            run.resident.append(resident)
            run.private.append(private or resident)
    except (EOFError, psutil.Error):
        process.join()
    if failed := run.all("failed"):
        run.failure = failed[0].facts["reason"]
    elif process.exitcode:
        run.failure = f"died with exit code {process.exitcode}"
    return run


# The worker.


class Reporter:
    """Sends marks to the process that watches."""

    def __init__(self, channel: Connection) -> None:
        self._channel = channel
        self._process = psutil.Process()
        self._peak_is_known = False

    def mark(self, name: str, *, tidy: bool = False, **facts: Any) -> None:
        """Report this moment; with ``tidy`` after what is not in use was given back to the system."""
        peak = high_water() if self._peak_is_known else None
        if tidy:
            return_memory()
        resident, private = _memory(self._process)
        self._peak_is_known = reset_high_water()
        self._channel.send(Mark(name, time.monotonic(), resident, private, peak, facts))


def work(system: System, job: Job, channel: Connection) -> None:
    """Load a system and put the requests to it, reporting as it goes."""
    reporter = Reporter(channel)
    try:
        # transformers imports a model's code on first use: an import all the same.
        getattr(transformers, AutoConfig.from_pretrained(job.directory, trust_remote_code=False).architectures[0])
        reporter.mark("imported", tidy=True)
        _forget_pages(job)
        # Not tidied: the pages that loading the tokenizer leaves half empty are its own doing, for every system.
        tokenizer_loaded = partial(reporter.mark, "tokenizer")
        rank, facts = system.load(job.directory, tokenizer_loaded, **system.settings)
        reporter.mark("loaded", **facts)
        for request in islice(cycle(job.requests), job.rounds):
            _forget_pages(job)
            reporter.mark("begin")
            before, started = _storage_read(), time.perf_counter()
            facts = rank(request)
            facts["seconds"] = time.perf_counter() - started
            if (after := _storage_read()) is not None and before is not None:
                facts["storage_read"] = after - before
            reporter.mark("end", **facts)
    except Exception as error:
        reporter.mark("failed", reason=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())


def _forget_pages(job: Job) -> None:
    """Drop the checkpoint from the page cache, unless somebody has it mapped: the next read is from the disk."""
    if job.warm or not hasattr(os, "posix_fadvise"):
        return
    for path in job.directory.glob("*.safetensors"):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)  # pages not yet written would stay
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def return_memory() -> None:
    """Give what is not in use back to the system."""
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # glibc has it
        trim(0)


def _memory(process: psutil.Process) -> tuple[int, int | None]:
    """Resident bytes of a process, and the part of them that is not mapped from a file."""
    memory = process.memory_info()
    return memory.rss, memory.rss - memory.shared if hasattr(memory, "shared") else None


def reset_high_water() -> bool:
    """Let the kernel forget the most memory this process had so far, and tell whether it can."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def high_water() -> int:
    """The most bytes this process had in memory since the kernel last forgot."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def _storage_read() -> int | None:
    """Bytes that this process has had from the disk, read-ahead included, where the system counts them."""
    process = psutil.Process()
    return process.io_counters().read_bytes if hasattr(process, "io_counters") else None
