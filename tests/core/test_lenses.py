"""Lenses on disk: what is read is what was written, and it is only used with the weights it belongs to."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from grating_core import LensError, Prompt, Reranker
from grating_core.lenses import CalibratedLens, Summary, find_lens, lens_directory
from grating_core.models.fingerprint import fingerprint
from grating_core.models.lens import LayerMap, Lens, compares_tokens, feature_count
from grating_core.pruning import Margins
from tests.core.conftest import save_model
from tests.core.parity import load

DEPTH, WIDTH = 5, 32


def calibrated(identity: str) -> CalibratedLens:
    chance = torch.Generator().manual_seed(1)
    counts = [feature_count(WIDTH, compares_tokens(number, DEPTH)) for number in range(DEPTH)]
    maps = [LayerMap(torch.randn(count, generator=chance), torch.tensor(0.25)) for count in counts]
    spread = np.linspace(2, 1, DEPTH)
    margins = Margins(
        spread, spread, np.array([1.0, 2.0]), np.array([[10, 3]]), np.array([0.5, 0.01]) * np.ones((2, 2, 1, 2))
    )
    summary = Summary(30, 20, 10, 3, 0.98, 0.99, 0.6, (0.1, 0.2, 0.3, 0.4, 0.5))
    return CalibratedLens(Lens(maps, "first"), margins, identity, summary)


@pytest.fixture
def cache(spill_directory: Path) -> Path:
    return spill_directory


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    written = calibrated("abc")
    written.save(tmp_path / "a" / "lens")
    found = CalibratedLens.load(tmp_path / "a" / "lens")
    assert found.fingerprint == "abc"
    assert found.summary == written.summary
    assert found.lens.pooling == "first"
    for one, other in zip(found.lens.maps, written.lens.maps, strict=True):
        assert torch.equal(one.weight, other.weight)
        assert torch.equal(one.bias, other.bias)
    for name in Margins.__annotations__:
        assert np.array_equal(getattr(found.margins, name), getattr(written.margins, name))
    assert sorted(path.name for path in (tmp_path / "a" / "lens").iterdir()) == ["lens.json", "lens.safetensors"]


def test_auto_finds_the_lens_of_the_model(tiny_bert: Path, cache: Path) -> None:
    identity = fingerprint(tiny_bert, None, None)
    assert load(tiny_bert, pruning="auto").lens is None
    calibrated(identity).save(lens_directory(identity))
    found = load(tiny_bert, pruning="auto").lens
    assert found is not None
    assert found.fingerprint == identity
    assert load(tiny_bert, pruning="cluster").lens is None


def test_a_lens_for_other_weights_is_refused(tiny_bert: Path, tmp_path: Path, cache: Path) -> None:
    other = save_model(tmp_path / "other", "bert", seed=1)
    calibrated(fingerprint(other, None, None)).save(tmp_path / "lens")
    with pytest.raises(LensError, match=r"other weights.*grating calibrate"):
        load(tiny_bert, pruning="auto", lens=tmp_path / "lens")
    assert load(other, pruning="auto", lens=tmp_path / "lens").lens is not None
    assert find_lens(fingerprint(tiny_bert, None, None)) is None


def test_the_same_weights_elsewhere_have_the_same_fingerprint(tiny_bert: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_bert, tmp_path / "copy")
    (copy / "README.md").write_text("hello")
    expected = fingerprint(tiny_bert, None, None)
    assert fingerprint(copy, None, None) == expected
    assert fingerprint(tiny_bert, None, Prompt(pieces=("{query} {document}",))) != expected
    data = bytearray((copy / "model.safetensors").read_bytes())
    size = int.from_bytes(data[:8], "little")
    data[8 + size] ^= 1  # the first byte of the first tensor
    (copy / "model.safetensors").write_bytes(data)
    assert fingerprint(copy, None, None) != expected


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "lens.json").unlink(), "no lens in"),
        (lambda d: (d / "lens.safetensors").unlink(), r"cannot be read.*lens\.safetensors"),
        (lambda d: (d / "lens.json").write_text("{"), r"lens\.json cannot be read"),
        (lambda d: (d / "lens.safetensors").write_bytes(b"12345678"), "is not the file"),
        (
            lambda d: (d / "lens.json").write_text(
                json.dumps(json.loads((d / "lens.json").read_text()) | {"format": 99})
            ),
            "format 99.*calibrate again",
        ),
    ],
)
def test_damage_is_named(damage: object, message: str, tiny_bert: Path, tmp_path: Path, cache: Path) -> None:
    calibrated(fingerprint(tiny_bert, None, None)).save(tmp_path)
    damage(tmp_path)
    with pytest.raises(LensError, match=message):
        load(tiny_bert, pruning="auto", lens=tmp_path)


def test_bad_settings(tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"target=1\.5"):
        load(tiny_bert, target=1.5)
    with pytest.raises(ValueError, match="guarantee='all'"):
        load(tiny_bert, guarantee="all")
    with pytest.raises(ValueError, match=r"lens=.*pruning='cluster'"):
        Reranker.from_pretrained(tiny_bert, pruning="cluster", lens=tmp_path)
