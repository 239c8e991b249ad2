"""A tiny random decoder with its tokenizer, and text for it."""

import random
from pathlib import Path

import pytest

from tests.core.conftest import WORDS
from tests.core.models.test_decoders import save_decoder
from tests.core.parity import random_text

TEXT = random_text(400, random.Random(3), WORDS)


@pytest.fixture(scope="session")
def decoder_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("decoder"), "llama")
