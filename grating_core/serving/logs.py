"""Logs are lines of JSON. They have numbers, names and the request's id, never a text of a request."""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TextIO

log = logging.getLogger("grating.serving")

_ROOMS = {"grating": logging.INFO, "uvicorn": logging.INFO, "mcp": logging.WARNING}  # what is written of whom


class JsonLines(logging.Formatter):
    """This formatter writes a line of JSON for each record."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        told: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        told |= getattr(record, "told", {})
        if record.exc_info and record.exc_info[1] is not None:
            told |= cause(record.exc_info[1])
        return json.dumps(told, ensure_ascii=False, default=str)


def cause(error: BaseException) -> dict[str, Any]:
    """Return the kind of an error and the places that it came through. Its message may have a text in it."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}" for frame in frames]
    return {"error": type(error).__name__, "at": places}


def tell(event: str, told: Mapping[str, Any], *, level: int = logging.INFO) -> None:
    """Log an event with what there is to tell of it."""
    log.log(level, event, extra={"told": dict(told)})


def write_to(stream: TextIO) -> None:
    """Let the server's log go to a stream."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    for name, level in _ROOMS.items():
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False
