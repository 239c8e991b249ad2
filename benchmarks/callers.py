"""What a process of benchmarks/passes.py does: it answers the same requests in several ways."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.worker import Ask, Facts, Ready, forget_pages

TOP_K = 5
THREADS = 8

Asked = tuple[str, list[str]]
"""A query with its candidates."""


def load_grating(ready: Ready, *, directory: Path, source: Path, max_length: int, smallest: bool) -> Ask:
    """Load the grating of a source tree.

    Args:
        ready: See :class:`System`.
        directory: Directory of the model.
        source: The root of the source tree.
        max_length: Most tokens of a pair.
        smallest: Whether there is the smallest memory budget, or none.
    """
    grating = import_from(source)
    settings = {"device": "cpu", "dtype": "bfloat16", "pruning": "off", "max_length": max_length}
    budget = None
    if smallest:
        try:
            grating.Reranker.from_pretrained(directory, memory_budget=1, **settings)
        except grating.BudgetError as error:
            budget = error.smallest
    ready()
    reranker = grating.Reranker.from_pretrained(directory, memory_budget=budget, **settings)

    def rank(request: Asked) -> None:
        reranker.rerank(*request, TOP_K)

    def one_after_another(requests: Sequence[Asked]) -> list[float]:
        return [timed(directory, rank, request) for request in requests]

    def together(requests: Sequence[Asked]) -> list[float]:
        many = [grating.Request(*request, TOP_K) for request in requests]
        return [timed(directory, reranker.rerank_many, many)] * len(many)

    def in_threads(requests: Sequence[Asked]) -> list[float]:
        with ThreadPoolExecutor(THREADS) as pool:
            each = pool.map(one_after_another, [requests[first::THREADS] for first in range(THREADS)])
            return [seconds for found in each for seconds in found]

    ways: dict[str, Callable[[Sequence[Asked]], list[float]]] = {
        "one after another": one_after_another,
        "together": together,
        "in threads": in_threads,
    }

    def ask(question: tuple[str, list[Asked]]) -> Facts:
        way, requests = question
        if way == "together" and not hasattr(reranker, "rerank_many"):
            return {"budget": budget, "latencies": []}  # an older commit does not have it
        return {"budget": budget, "latencies": ways[way](requests)}

    return ask


def timed(directory: Path, call: Callable[[Any], object], what: Any) -> float:
    """Return the seconds of a call that begins with the model's pages out of the page cache."""
    forget_pages(directory)
    started = time.perf_counter()
    call(what)
    return time.perf_counter() - started


def import_from(source: Path) -> Any:
    """Import grating from a source tree, instead of the one that measures."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "grating_core"]:
        del sys.modules[name]
    sys.path.insert(0, str(source))
    grating = import_module("grating_core")
    assert grating.__file__ is not None
    assert Path(grating.__file__).is_relative_to(source)
    return grating
