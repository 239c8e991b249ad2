"""Metrics are numbers for Prometheus: requests, their time and size, and what waits for each model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from grating_core.results import RerankResult
from grating_core.serving.models import ServedModel

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


class Metrics:
    """This class counts what a server does.

    Args:
        models: The models, whose queues are looked at when somebody asks.
    """

    def __init__(self, models: Iterable[ServedModel]) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "grating_requests", "Requests, by path and status.", ("path", "status"), registry=registry
        )
        self._seconds = Histogram(
            "grating_request_seconds", "Seconds of a request.", ("path",), buckets=_SECONDS, registry=registry
        )
        self._documents = Counter("grating_documents", "Documents ranked.", ("model",), registry=registry)
        self._truncated = Counter(
            "grating_truncated_documents", "Documents that were cut.", ("model",), registry=registry
        )
        self._tokens = Counter("grating_tokens", "Tokens ranked.", ("model",), registry=registry)
        self._cut_short = Counter(
            "grating_cut_short",
            "Requests whose deadline came before all was computed.",
            ("model",),
            registry=registry,
        )
        self._share = Histogram(
            "grating_compute_share", "Share of the unpruned work.", ("model",), buckets=_SHARES, registry=registry
        )
        waiting = Gauge("grating_queue_tokens", "Tokens that wait or are computed.", ("model",), registry=registry)
        callers = Gauge(
            "grating_queue_requests", "Requests that wait or are computed.", ("model",), registry=registry
        )
        for model in models:
            waiting.labels(model.name).set_function(partial(getattr, model.queue, "tokens"))
            callers.labels(model.name).set_function(partial(getattr, model.queue, "requests"))

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Count a request, whatever its answer was."""
        self._requests.labels(path, status).inc()
        self._seconds.labels(path).observe(seconds)

    def ranked(self, model: str, results: Sequence[RerankResult]) -> None:
        """Count what a model has ranked."""
        for result in results:
            trace = result.trace
            self._documents.labels(model).inc(len(trace.lengths))
            self._truncated.labels(model).inc(len(trace.truncated))
            self._tokens.labels(model).inc(sum(trace.lengths))
            self._cut_short.labels(model).inc(trace.cut_short)
            self._share.labels(model).observe(trace.compute_share)

    def text(self) -> bytes:
        """Return all numbers in the format of Prometheus."""
        return generate_latest(self._registry)
