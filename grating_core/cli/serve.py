"""This is the command ``grating serve``."""

from __future__ import annotations

import gc
import os
import sys
from dataclasses import replace
from typing import Annotated

from grating_core.cli.options import Takes
from grating_core.cli.output import err, tell
from grating_core.serving.settings import ServeSettings
from grating_core.settings import RerankSettings

Settings = Annotated[RerankSettings, Takes(beside=("recalibrate",))]


def serve(settings: Settings, server: Annotated[ServeSettings, Takes()]) -> None:
    """Serve a reranker over HTTP, to clients of Cohere, Jina, vLLM, llama.cpp and text-embeddings-inference."""
    server = with_key(server)
    with err.status("Loading ..."):
        try:
            from grating_core.serving.server import address_of, listening, running
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"serving needs {error.name}: pip install 'grating-core[serve]'") from error
        from grating_core.serving.logs import write_to
        from grating_core.serving.models import ServedModels
    with listening(server.host, server.port) as listener:
        with err.status("Loading ..."):
            models = ServedModels.open(settings, server)
        gc.collect()
        gc.freeze()  # or else a collection looks through everything that was imported, and nobody is answered
        write_to(sys.stderr)
        address = address_of(listener)
        names = ", ".join(model.name for model in models)
        tell(f"Serving {names} at {address}; open it in a browser, or {address}/docs for the paths.")
        running(models, server).run(sockets=[listener])


def with_key(server: ServeSettings) -> ServeSettings:
    """Return the settings with the key of the environment, if they have none."""
    return replace(server, api_key=server.api_key or os.environ.get("GRATING_API_KEY") or None)
