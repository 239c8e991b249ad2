"""Lenses on disk: what is read is what was written, and it is only used with the weights it belongs to."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

from grating_core import Prompt, Reranker
from grating_core.errors import FileError
from grating_core.lens.features import LayerMap, Lens, compares_tokens, feature_count
from grating_core.lens.store import CalibratedLens, Summary, find_lens, lens_directory, open_lens
from grating_core.models.cross_encoder import Shape
from grating_core.models.identity import fingerprint
from grating_core.pruning import Margins
from tests.core.conftest import save_model
from tests.core.parity import load

DEPTH, WIDTH = 5, 32
SHAPE = Shape(DEPTH, WIDTH, "first")
Damage = Callable[[dict[str, Any], dict[str, torch.Tensor]], object]


def calibrated(identity: str) -> CalibratedLens:
    chance = torch.Generator().manual_seed(1)
    counts = [feature_count(WIDTH, compares_tokens(number, DEPTH)) for number in range(DEPTH)]
    maps = [LayerMap(torch.randn(count, generator=chance), torch.tensor(0.25)) for count in counts]
    spread = np.linspace(2, 1, DEPTH)
    bounds = np.array([0.5, 0.01]) * np.ones((2, 2, 1, 2))
    looks = np.ones((1, DEPTH), dtype=bool)
    margins = Margins(spread, spread, np.array([1.0, 2.0]), np.array([[10, 3]]), bounds, looks)
    summary = Summary(30, 1, 10, 3, 0.98, 0.99, 0.6, (0.1, 0.2, 0.3, 0.4, 0.5))
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
    identity = fingerprint(tiny_bert)
    assert load(tiny_bert, pruning="auto").lens is None
    calibrated(identity).save(lens_directory(identity))
    found = load(tiny_bert, pruning="auto").lens
    assert found is not None
    assert found.fingerprint == identity
    assert load(tiny_bert, pruning="cluster").lens is None


def test_a_lens_for_other_weights_is_refused(tiny_bert: Path, tmp_path: Path, cache: Path) -> None:
    other = save_model(tmp_path / "other", "bert", seed=1)
    calibrated(fingerprint(other)).save(tmp_path / "lens")
    with pytest.raises(FileError, match=r"other weights.*grating calibrate"):
        load(tiny_bert, pruning="auto", lens=tmp_path / "lens")
    assert load(other, pruning="auto", lens=tmp_path / "lens").lens is not None
    assert find_lens(fingerprint(tiny_bert), SHAPE) is None


def test_the_same_weights_elsewhere_have_the_same_fingerprint(tiny_bert: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_bert, tmp_path / "copy")
    (copy / "README.md").write_text("hello")
    expected = fingerprint(tiny_bert)
    assert fingerprint(copy) == expected
    assert fingerprint(tiny_bert, None, Prompt(pieces=("{query} {document}",)).asked) != expected
    data = bytearray((copy / "model.safetensors").read_bytes())
    size = int.from_bytes(data[:8], "little")
    data[8 + size] ^= 1  # the first byte of the first tensor
    (copy / "model.safetensors").write_bytes(data)
    assert fingerprint(copy) != expected


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
    calibrated(fingerprint(tiny_bert)).save(tmp_path)
    damage(tmp_path)
    with pytest.raises(FileError, match=message):
        load(tiny_bert, pruning="auto", lens=tmp_path)


NOT_A_DESCRIPTION = ("", "{", "[]", "null", "7", '"lens"', "{}", "\x00" * 20, "[" * 100_000, '{"format": 1}')


@pytest.mark.parametrize("text", [*NOT_A_DESCRIPTION, '{"format": 2}', '{"format": 3, "anything": "new"}'])
def test_a_lens_in_the_cache_that_cannot_be_read_is_left_out_with_a_warning_once(
    text: str, tiny_bert: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = lens_directory(fingerprint(tiny_bert))
    directory.mkdir(parents=True)
    (directory / "lens.json").write_text(text)
    for _ in range(2):
        assert load(tiny_bert, pruning="auto").lens is None
    assert len(caplog.messages) == 1
    assert str(directory / "lens.json") in caplog.text
    with pytest.raises(FileError, match=r"lens\.json"):
        load(tiny_bert, pruning="auto", lens=directory)


def set_summary(name: str, value: object) -> Damage:
    return lambda description, tensors: description["summary"].update({name: value})


def set_description(name: str, value: object) -> Damage:
    return lambda description, tensors: description.update({name: value})


def change(name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return lambda description, tensors: tensors.update({name: function(tensors[name])})


def put(place: tuple[int, ...], value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.index_put(
        tuple(map(torch.tensor, place)), torch.tensor(value, dtype=tensor.dtype)
    )


TENSORS = ["layer.0.weight", "layer.4.bias", *(f"margins.{name}" for name in Margins.__annotations__)]
DAMAGE: dict[str, Damage] = {
    **{f"{name} is missing": lambda d, t, name=name: t.pop(name) for name in TENSORS},
    **{f"{name} is cut": change(name, lambda tensor: tensor.flatten()[:-1]) for name in TENSORS},
    **{f"{name} is of another kind": change(name, lambda tensor: tensor.to(torch.float16)) for name in TENSORS},
    **{f"{name} is 8-bit": change(name, lambda tensor: tensor.to(torch.int8)) for name in TENSORS},
    **{f"{name} has another axis": change(name, lambda tensor: tensor[None]) for name in TENSORS},
    **{f"{name} is empty": change(name, lambda tensor: tensor.new_empty(0)) for name in TENSORS},
    **{
        f"{name} has {value}": change(name, lambda tensor, value=value: torch.full_like(tensor, value))
        for name in TENSORS if name not in ("margins.cells", "margins.looks")
        for value in (float("nan"), float("inf"))
    },
    "one weight is NaN": change("layer.3.weight", put((7,), float("nan"))),
    "a margin is negative": change("margins.drop", put((2,), -1.0)),
    "factors fall": change("margins.factors", lambda tensor: tensor.flip(0)),
    "factors stay": change("margins.factors", torch.ones_like),
    "bounds rise": change("margins.bounds", lambda tensor: tensor.flip(-1)),
    "one bound rises": change("margins.bounds", put((1, 1, 0, 1), 0.6)),
    "a bound is above 1": change("margins.bounds", put((0, 0, 0, 0), 1.5)),
    "a cell for no documents": change("margins.cells", put((0, 1), 0)),
    "a K above N": change("margins.cells", put((0, 1), 11)),
    "a cell twice": lambda d, t: t.update(
        {
            f"margins.{name}": t[f"margins.{name}"].repeat(times)
            for name, times in (("cells", (2, 1)), ("bounds", (1, 1, 2, 1)), ("looks", (2, 1)))
        }
    ),
    "margins of another depth": lambda d, t: t.update(
        {name: t[name][..., :-1].clone() for name in ("margins.drop", "margins.select", "margins.looks")}
    ),
    "a layer less": lambda d, t: (set_description("layers", 4)(d, t), set_summary("gammas", [0.1] * 4)(d, t)),
    **{f"layers={value!r}": set_description("layers", value) for value in (0, -1, 6, 10**9, "5", 5.0, None, True)},
    **{f"pooling={value!r}": set_description("pooling", value) for value in ("cls", "last", "mean", 1, None)},
    **{f"fingerprint={value!r}": set_description("fingerprint", value) for value in (1, None, "", "abc", ["a"])},
    **{f"sha256={value!r}": set_description("sha256", value) for value in (1, None, "", "abc")},
    **{f"summary={value!r}": set_description("summary", value) for value in ({}, [], None, "good", 1)},
    **{
        f"{name}={value!r}": set_summary(name, value)
        for name in ("requests", "top_k", "target", "agreement", "gammas")
        for value in ("1", None, [], float("nan"), -float("inf"), True, {})
    },
    "gammas are words": set_summary("gammas", ["a"] * 5),
    "gammas are few": set_summary("gammas", [0.5]),
    "a new field": set_summary("verdict", 1),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_lens_is_refused_when_it_is_read(
    damage: str, tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whole files, so that no digest tells: what they say makes no sense, or not for this model."""
    directory = lens_directory("identity")
    calibrated("identity").save(directory)
    assert find_lens("identity", SHAPE) is not None
    description = json.loads((directory / "lens.json").read_text())
    tensors = load_file(directory / "lens.safetensors")
    DAMAGE[damage](description, tensors)
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    (directory / "lens.safetensors").write_bytes(data)
    if not damage.startswith("sha256"):
        description["sha256"] = hashlib.sha256(data).hexdigest()
    (directory / "lens.json").write_text(json.dumps(description))
    with pytest.raises(FileError, match=r"lens.*(cannot be read|other weights|is not the file)"):
        open_lens(directory, SHAPE, "identity")
    assert find_lens("identity", SHAPE) is None
    assert str(directory) in caplog.text


def test_bytes_of_a_lens_that_are_damaged(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Wherever a file is cut or a byte changed, the lens is as it was or is left out."""
    directory = lens_directory("identity")
    chance = np.random.default_rng(0)
    for name in ("lens.json", "lens.safetensors"):
        calibrated("identity").save(directory)
        whole = (directory / name).read_bytes()
        for place in chance.integers(len(whole), size=40).tolist():
            damaged = bytes([whole[place] ^ int(chance.integers(1, 256))])
            for data in (whole[:place], whole[:place] + damaged + whole[place + 1 :]):
                (directory / name).write_bytes(data)
                try:
                    found = open_lens(directory, SHAPE, "identity")
                except FileError:
                    continue
                # A digit of the summary tells nothing that could be checked.
                assert name == "lens.json"
                assert found.margins.drop.tolist() == calibrated("identity").margins.drop.tolist()


def test_a_named_pipe_in_the_place_of_a_lens(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = lens_directory("identity")
    for name in ("lens.json", "lens.safetensors"):
        calibrated("identity").save(directory)
        (directory / name).unlink()
        os.mkfifo(directory / name)
        assert find_lens("identity", SHAPE) is None
        (directory / name).unlink()
    assert caplog.text.count("not a regular file") == 2


def test_the_lenses_that_come_with_the_package_are_whole(bundled: Reranker) -> None:
    assert find_lens(bundled.identity, bundled.scorer.model.shape) is not None


def test_bad_settings(tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"target=1\.5"):
        load(tiny_bert, target=1.5)
    with pytest.raises(ValueError, match="guarantee='all'"):
        load(tiny_bert, guarantee="all")
    with pytest.raises(ValueError, match=r"lens=.*pruning='cluster'"):
        Reranker.from_pretrained(tiny_bert, pruning="cluster", lens=tmp_path)
