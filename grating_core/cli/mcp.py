"""This is the command ``grating mcp``."""

from __future__ import annotations

import sys
from contextlib import ExitStack, closing
from typing import Annotated

from grating_core.cli.options import Takes
from grating_core.cli.output import err, tell
from grating_core.cli.serve import Settings, with_key
from grating_core.serving.settings import ServeSettings

Server = Annotated[ServeSettings, Takes(without=("name", "also"))]


def mcp(settings: Settings, server: Server, http: bool = False) -> None:
    """Give agents a reranker as tools of the Model Context Protocol, over standard input and output.

    Args:
        http: Whether to answer over HTTP instead, at the path /mcp.
    """
    import asyncio  # `grating --help` would wait for it

    with err.status("Loading ..."):
        try:
            from grating_core.serving.mcp import PATH, Tools
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"this needs {error.name}: pip install 'grating-core[mcp]'") from error
        from grating_core.serving.logs import write_to
        from grating_core.serving.models import ServedModels
        from grating_core.serving.server import address_of, listening, process
    server = with_key(server)
    with ExitStack() as until_the_end:
        listener = until_the_end.enter_context(listening(server.host, server.port)) if http else None
        with err.status("Loading ..."):
            tools = Tools(models := ServedModels.open(settings, server), server)
        write_to(sys.stderr)
        if listener is None:
            with closing(models):
                asyncio.run(tools.over_stdio())
        else:
            tell(f"Serving tools at {address_of(listener)}{PATH}.")
            process(tools.asgi(), server).run(sockets=[listener])
