"""Spans of OpenTelemetry tell how long a call took, what it used and what came of it.

Their names are those of OpenInference (https://arize-ai.github.io/openinference/spec) and of OpenTelemetry's
conventions for generative AI, with the names that are proposed there for reranking
(https://github.com/open-telemetry/semantic-conventions-genai/issues/253). Texts are left out, unless the variable
``OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT`` is ``true``, ``span_only`` or ``span_and_event``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

from grating_core.requests import Request
from grating_core.results import Generation, RerankResult
from grating_core.settings import AnswerSettings

if TYPE_CHECKING:
    from opentelemetry.trace import Span

CAPTURE = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
"""The variable that asks for texts."""

_IN_SPANS = ("true", "span_only", "span_and_event")

_PROVIDER = {"gen_ai.provider.name": "grating"}


@contextmanager
def reranking(
    model: str, requests: Sequence[Request]
) -> Iterator[Callable[[list[RerankResult]], list[RerankResult]]]:
    """Have a span for each request, until the end of the ``with``.

    Args:
        model: The name of the model.
        requests: The requests.

    Yields:
        A function that takes the results, in the order of the requests, and returns them.
    """
    if (trace := _opentelemetry()) is None:
        yield lambda results: results
        return
    with ExitStack() as until_the_end:
        spans = [
            until_the_end.enter_context(_span(trace, f"rerank {model}", _of_request(model, request)))
            for request in requests
        ]

        def found(results: list[RerankResult]) -> list[RerankResult]:
            for span, request, result in zip(spans, requests, results, strict=True):
                if span.is_recording():
                    # A span has room for so many attributes, and the latest stay.
                    span.set_attributes(_documents(request, result))
                    span.set_attributes(_of_request(model, request) | _of_result(result))
            return results

        yield found


@contextmanager
def scoring(model: str, pairs: int) -> Iterator[Callable[[int], None]]:
    """Have a span for scores of pairs, until the end of the ``with``.

    Args:
        model: The name of the model.
        pairs: The number of pairs of a query and a text.

    Yields:
        A function that takes the number of tokens that were computed.
    """
    if (trace := _opentelemetry()) is None:
        yield lambda tokens: None
        return
    with _span(trace, f"score {model}", _of_model(model, pairs)) as span:
        yield lambda tokens: span.set_attribute("gen_ai.usage.input_tokens", tokens)


def generating(
    stream: Generator[str, None, Generation],
    model: str,
    prompt: str | Sequence[Mapping[str, Any]],
    how: AnswerSettings,
) -> Generator[str, None, Generation]:
    """Return a stream of text with a span around it, from when the first piece is asked for.

    Args:
        stream: The pieces of the text.
        model: The name of the model.
        prompt: The text that is continued, or the messages that are answered.
        how: The settings of the text.
    """
    if (trace := _opentelemetry()) is None:
        return (yield from stream)
    operation = "text_completion" if isinstance(prompt, str) else "chat"
    asked = {
        "openinference.span.kind": "LLM",
        "llm.model_name": model,
        "gen_ai.operation.name": operation,
        **_PROVIDER,
        "gen_ai.request.model": model,
        "gen_ai.request.max_tokens": how.max_new_tokens,
        "gen_ai.request.temperature": float(how.temperature),
        "gen_ai.request.top_p": float(how.top_p),
    }
    if how.seed is not None:
        asked["gen_ai.request.seed"] = how.seed
    with _span(trace, f"{operation} {model}", asked) as span:
        generation = yield from stream
        if span.is_recording():
            span.set_attributes(_of_generation(generation))
            if _texts_are_asked_for():
                span.set_attributes(_messages(prompt, generation))
    return generation


@contextmanager
def serving(path: str, headers: Mapping[str, str]) -> Iterator[Callable[[int], None]]:
    """Have a span for an HTTP POST, which is part of the client's trace if the headers name one.

    Args:
        path: The path.
        headers: The request's headers.

    Yields:
        A function that takes the status of the answer.
    """
    if (trace := _opentelemetry()) is None:
        yield lambda status: None
        return
    from opentelemetry.propagate import extract

    asked = {"http.request.method": "POST", "http.route": path}
    with (
        _span(trace, f"POST {path}", asked, context=extract(headers), kind=trace.SpanKind.SERVER) as span,
        trace.use_span(span, record_exception=False, set_status_on_exception=False),
    ):

        def answered(status: int) -> None:
            span.set_attribute("http.response.status_code", status)
            if status >= 500:
                span.set_attribute("error.type", str(status))
                span.set_status(trace.StatusCode.ERROR)

        yield answered


def _opentelemetry() -> ModuleType | None:
    """Return the module, if somebody has imported it. Whoever set a provider of spans has."""
    return sys.modules.get("opentelemetry.trace")


@contextmanager
def _span(trace: ModuleType, name: str, attributes: Mapping[str, Any], **how: Any) -> Iterator[Span]:
    """Have a span until the end of the ``with``. An error leaves only its kind: its message may be a text."""
    span: Span = trace.get_tracer("grating").start_span(name, attributes=attributes, **how)
    try:
        yield span
    except Exception as error:
        span.set_attribute("error.type", type(error).__qualname__)
        span.set_status(trace.StatusCode.ERROR)
        raise
    finally:
        span.end()


def _texts_are_asked_for() -> bool:
    return os.environ.get(CAPTURE, "").strip().lower() in _IN_SPANS


def _of_model(model: str, candidates: int) -> dict[str, Any]:
    return {
        "openinference.span.kind": "RERANKER",
        "reranker.model_name": model,
        "gen_ai.operation.name": "rerank",
        **_PROVIDER,
        "gen_ai.request.model": model,
        "gen_ai.rerank.candidate.count": candidates,
    }


def _of_request(model: str, request: Request) -> dict[str, Any]:
    asked = _of_model(model, len(request.documents))
    return asked | {"reranker.top_k": request.top_k, "gen_ai.rerank.top_n": request.top_k}


def _of_result(result: RerankResult) -> dict[str, Any]:
    trace = result.trace
    return {
        "gen_ai.rerank.scores": [ranked.score for ranked in result.ranking],
        "gen_ai.usage.input_tokens": sum(trace.lengths),
        "grating.compute_share": trace.compute_share,
        "grating.truncated_documents": len(trace.truncated),
        "grating.cut_short": trace.cut_short,
    }


def _documents(request: Request, result: RerankResult) -> dict[str, Any]:
    """Return ids and scores of what was found, the best last; and all texts, if they are asked for."""
    texts = _texts_are_asked_for()
    found: dict[str, Any] = {}
    if texts:
        for index, text in enumerate(request.documents):
            found[f"reranker.input_documents.{index}.document.id"] = index
            found[f"reranker.input_documents.{index}.document.content"] = text
    for place, ranked in reversed(list(enumerate(result.ranking))):
        name = f"reranker.output_documents.{place}.document"
        if texts:
            found[f"{name}.content"] = ranked.text
        found |= {f"{name}.id": ranked.index, f"{name}.score": ranked.score}
    return found | ({"reranker.query": request.query} if texts else {})


def _of_generation(generation: Generation) -> dict[str, Any]:
    prompt, new = generation.prompt_tokens, generation.new_tokens
    return {
        "gen_ai.usage.input_tokens": prompt,
        "gen_ai.usage.output_tokens": new,
        "gen_ai.response.finish_reasons": [generation.finish_reason],
        "gen_ai.response.time_to_first_chunk": generation.seconds_to_first,
        "llm.token_count.prompt": prompt,
        "llm.token_count.completion": new,
        "llm.token_count.total": prompt + new,
    }


def _messages(prompt: str | Sequence[Mapping[str, Any]], generation: Generation) -> dict[str, Any]:
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    told = _message("assistant", generation.text) | {"finish_reason": generation.finish_reason}
    return {
        "gen_ai.input.messages": json.dumps([_message(one["role"], one["content"]) for one in asked]),
        "gen_ai.output.messages": json.dumps([told]),
    }


def _message(role: str, content: Any) -> dict[str, Any]:
    parts = [{"type": "text", "content": content}] if isinstance(content, str) else content
    return {"role": role, "parts": parts}
