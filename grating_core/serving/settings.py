"""This module lists the settings of the HTTP server: names, types, defaults, texts and checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grating_core.arguments import is_number, whole_number
from grating_core.settings import setting


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """This class holds the settings of the HTTP server, beside those of its model.

    Raises:
        ValueError: A value is not usable; the message names it.
    """

    host: str = setting("127.0.0.1", "The address to listen at. 0.0.0.0 lets other machines call.")
    port: int = setting(8080, "The port to listen at. 0 takes a free one.")
    api_key: str | None = setting(
        None,
        "The key that clients must send as 'Authorization: Bearer KEY'. None takes the variable GRATING_API_KEY; "
        "without both, no key is asked for.",
        shown=False,
    )
    name: str | None = setting(
        None, "The name by which clients ask for the model. None takes the model's own, without a path."
    )
    also: Sequence[str] = setting((), "Further models, as MODEL or NAME=MODEL. They share the settings.")
    max_body: int = setting(4_000_000, "The most bytes of a request's body.")
    max_documents: int = setting(1000, "The most entries of a list in a request, such as its documents.")
    max_tokens: int = setting(131_072, "The most tokens of a request, over all its documents.")
    queue_tokens: int = setting(
        262_144, "The most tokens of all requests that wait for a model. More are told to come again later."
    )
    deadline: float = setting(60.0, "The seconds after which the best ranking so far is the answer to a request.")
    drain: float = setting(30.0, "The most seconds that requests in progress get when the server is stopped.")

    def __post_init__(self) -> None:
        for name in ("max_body", "max_documents", "max_tokens", "queue_tokens"):
            whole_number(name, getattr(self, name))
        if whole_number("port", self.port, 0) > 65_535:
            raise ValueError(f"port={self.port} must be at most 65535")
        for name in ("deadline", "drain"):
            if not is_number(getattr(self, name)) or not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be a number of seconds above 0")
