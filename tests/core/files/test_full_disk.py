"""Disks that are too small, mounted for the test."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from grating_core import Reranker
from grating_core.errors import StorageError
from grating_core.lab import activations
from grating_core.lens.observations import Observations
from grating_core.models import bundled
from tests.core.columns.conftest import TEXT
from tests.core.conftest import WORDS, save_model
from tests.core.faults import small_disk
from tests.core.models.test_decoders import save_decoder
from tests.core.parity import random_text

SIZE = 1 << 20


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("GRATING_CACHE", str(tmp_path / "disk"))
    with small_disk(tmp_path / "disk", SIZE) as directory:
        yield directory


def left(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def test_a_conversion(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(bundled, "dequantise", lambda *_, **__: pytest.fail("it has been computed"))
        with pytest.raises(
            StorageError, match=rf"{disk}.* cannot be written: No space left.*takes 134\.5 MB, and"
        ):
            bundled.bundled_model(bundled.BUNDLED_RERANKER)
    assert not left(disk)


def test_a_calibration(disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = random.Random(0)
    texts = [random_text(20, source, WORDS) for _ in range(80)]
    computed = []
    add = Observations.add
    monkeypatch.setattr(Observations, "add", lambda *given: (computed.append(1), add(*given))[1])
    with Reranker.from_pretrained(save_model(tmp_path / "model", "bert"), dtype="float32") as reranker:
        with pytest.raises(
            StorageError, match=rf"{disk}.* cannot be written: No space left.*takes \d\.\d MB, and"
        ):
            reranker.calibrate(texts, top_k=5, candidates=20, requests=80)
        assert len(computed) == 1  # room for all is taken with the first
        assert not left(disk)
        reranker.calibrate(texts, top_k=2, candidates=5, requests=25)
    assert sorted(path.name for path in left(disk)) == ["lens.json", "lens.safetensors"]


def test_a_recording(disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_decoder(tmp_path / "model", "llama")
    with monkeypatch.context() as patched:
        patched.setattr(activations, "load_decoder", lambda *_: pytest.fail("it has been computed"))
        with pytest.raises(StorageError, match=rf"{disk}.* cannot be written: No space left.*takes .* MB, and"):
            activations.record_activations(model, TEXT, 10_000)
    assert not left(disk)
    activations.record_activations(model, TEXT, 20)
    (path,) = left(disk)
    assert path.stat().st_mode & 0o777 == 0o600  # it is derived from the text
    assert path.parent.stat().st_mode & 0o777 == 0o700
