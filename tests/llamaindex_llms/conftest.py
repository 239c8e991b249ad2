"""A tiny language model."""

from tests.tiny_chat import core, directory  # noqa: F401 - fixtures
