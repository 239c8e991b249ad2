"""A real server with the bundled model, in this process; and the question that the tests ask."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from grating_core import Reranker
from grating_core.serving.models import ServedModel, ServedModels
from grating_core.serving.server import listening, running
from grating_core.serving.settings import ServeSettings
from tests.core.conftest import BUNDLED

QUERY = "How many people live in Berlin?"
DOCUMENTS = [
    "New York City is famous for the Metropolitan Museum of Art.",
    "Berlin had a population of 3,520,031 registered inhabitants in 2015.",
    "Berlin is well known for its museums.",
]
ORDER = [1, 2, 0]
NAME = "berlin"
OF_CLIENTS = [
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.usefixtures("connections"),
]
"""The marks of tests whose clients may leave connections open."""


@contextmanager
def serving(reranker: Reranker, name: str = NAME, **settings: object) -> Iterator[str]:
    """Serve a reranker on a free port, and yield the server's address. The reranker is closed at the end."""
    server = ServeSettings(port=0, **settings)
    models = ServedModels([ServedModel(name, reranker, server)])
    with listening(server.host, server.port) as listener:
        process = running(models, server)
        thread = threading.Thread(target=process.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            process.should_exit = True
            thread.join()


def real_model(**settings: object) -> Reranker:
    return Reranker.from_pretrained(BUNDLED, dtype="float32", device="cpu", **settings)


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """The address of a server with the bundled model as it is served by default, but in float32."""
    with serving(real_model()) as address:
        yield address


@pytest.fixture(scope="session")
def client(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=60) as client:
        yield client
