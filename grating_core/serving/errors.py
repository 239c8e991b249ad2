"""A request is refused with a status, a word for programs and a sentence for people."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from pydantic import ValidationError

_SHOWN = 80  # characters of a field's name, which the client may have made up


class Refused(Exception):
    """The server does not answer a request.

    Args:
        status: The HTTP status.
        kind: A word for programs: ``validation``, ``authentication``, ``not_found``, ``overloaded``, ``deadline``,
            ``unhealthy`` or ``backend``. They are those of text-embeddings-inference, and a few more.
        message: A sentence that names the field and the way out. It has no text of the request in it.
        retry_after: The seconds after which to come again; None does not say.
    """

    def __init__(self, status: int, kind: str, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.message = message
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}


def invalid(message: str) -> Refused:
    """Return the refusal of a field that has a value of the wrong kind."""
    return Refused(422, "validation", message)


def too_large(message: str) -> Refused:
    """Return the refusal of a request that has too much of something."""
    return Refused(413, "validation", message)


def overdue(seconds: float) -> Refused:
    """Return the refusal of a request that takes longer than it may."""
    return Refused(504, "deadline", f"the answer was not there within the deadline of {1000 * seconds:.0f} ms")


def failed() -> Refused:
    """Return what a client is told of an error of the server itself. The log says more."""
    return Refused(500, "backend", "The server could not compute this request. Its log has the reason.")


def of_status(status: int) -> Refused:
    """Return a refusal for what no handler answers: an unknown path, a wrong method."""
    kind = "not_found" if status == 404 else "validation"
    return Refused(status, kind, f"{HTTPStatus(status).phrase}: /docs lists the paths and methods of this server.")


def of_schema(error: ValidationError) -> Refused:
    """Return the refusal of a body that does not fit its schema. The sentence is about the first field."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path, told = _path(first["loc"]), first["msg"]
    if first["type"] == "missing":
        return invalid(f"{path} is missing")
    if first["type"] == "extra_forbidden":
        return invalid(f"{path} is unknown; leave it out")
    told = told.removeprefix("Value error, ").replace("Input should", "must").replace("String should", "must")
    if not first["loc"]:
        return invalid(told)
    return invalid(f"{path} {told}" if told.startswith("must") else f"{path}: {told}")


def _path(location: Sequence[str | int]) -> str:
    """Return the place of a field as a client would write it, such as ``documents[3].text``."""
    steps = (f"[{step}]" if isinstance(step, int) else f".{step[:_SHOWN]}" for step in location)
    return "".join(steps).removeprefix(".") or "the body"


def told(refused: Refused, request_id: str) -> dict[str, Any]:
    """Return the body of a refusal: Cohere's clients read ``message``, those of OpenAI's kind read ``error``."""
    error = {"message": refused.message, "type": refused.kind, "code": refused.status}
    return {"id": request_id, "message": refused.message, "error": error}
