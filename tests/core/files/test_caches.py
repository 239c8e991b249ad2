"""What lies in grating's cache, and how it is cleared."""

import os
import time
from pathlib import Path

import pytest

from grating_core.errors import StorageError
from grating_core.files.caches import KINDS, clear, contents
from grating_core.files.locks import locked, unfinished

DAY = 86_400


def put(path: Path, size: int, age: float = 0.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    os.utime(path, (time.time() - age,) * 2)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One thing of each kind, and things that are none of grating's."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("GRATING_CACHE", str(cache))
    put(cache / "models" / "minilm-12345678" / "model.safetensors", 1000, 9 * DAY)
    put(cache / "models" / "minilm-12345678" / "1_Pooling" / "config.json", 10, 8 * DAY)
    put(cache / "lenses" / "0123456789abcdef" / "lens.safetensors", 200, 3 * DAY)
    put(cache / "lenses" / "0123456789abcdef" / "lens.json", 20, 3 * DAY)
    put(cache / "columns" / "0123456789abcdef-float32.safetensors", 3000, 2 * DAY)
    put(cache / "layers" / "0123456789abcdef-int8.safetensors", 700, 2 * DAY)
    put(cache / "recalibration" / "0123456789abcdef-cluster.json", 40)
    put(cache / "activations" / "0123456789abcdef.safetensors", 500, 5 * DAY)
    put(cache / "preferences" / "0123456789abcdef.json", 60)
    put(cache / "models" / ".minilm-12345678-abcdef01" / "model.safetensors", 600, DAY)
    put(cache / "benchmarks" / "embeddings.npy", 1)
    put(cache / "notes.txt", 1)
    return cache


def found(directory: Path) -> list[tuple[str, str, int]]:
    return [(one.kind, str(one.path.relative_to(directory)), one.size) for one in contents()]


def test_all_that_grating_made_is_listed(cache: Path) -> None:
    assert found(cache) == [
        ("models", "models/minilm-12345678", 1010),
        ("lenses", "lenses/0123456789abcdef", 220),
        ("columns", "columns/0123456789abcdef-float32.safetensors", 3000),
        ("layers", "layers/0123456789abcdef-int8.safetensors", 700),
        ("states", "recalibration/0123456789abcdef-cluster.json", 40),
        ("activations", "activations/0123456789abcdef.safetensors", 500),
        ("preferences", "preferences/0123456789abcdef.json", 60),
        ("unfinished", "models/.minilm-12345678-abcdef01", 600),
    ]
    (model,) = contents(["models"])
    assert model.used == pytest.approx(time.time() - 8 * DAY, abs=60)  # of all files the last


def test_a_cache_that_is_not_there_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRATING_CACHE", str(tmp_path / "none"))
    assert contents() == []
    assert clear().removed == []
    monkeypatch.setenv("GRATING_CACHE", __file__)
    with pytest.raises(StorageError, match="cache cannot be read: Not a directory"):
        contents()


@pytest.mark.parametrize("kind", KINDS)
def test_clearing_by_kind(cache: Path, kind: str) -> None:
    before = found(cache)
    cleared = clear([kind])
    assert [one.kind for one in cleared.removed] == [kind]
    assert not cleared.kept
    assert not cleared.removed[0].path.exists()
    # With a model goes what was left unfinished of it.
    assert found(cache) == [
        row for row in before if row[0] not in ({kind, "unfinished"} if kind == "models" else {kind})
    ]


def test_clearing_by_age(cache: Path) -> None:
    old = contents(older_than=4 * DAY)
    assert [one.kind for one in old] == ["models", "activations"]
    assert clear(older_than=4 * DAY).removed == old
    assert clear(["columns"], older_than=4 * DAY).removed == []
    assert [one.kind for one in contents()] == ["lenses", "columns", "layers", "states", "preferences"]


def test_clearing_everything_leaves_what_grating_did_not_make(cache: Path) -> None:
    assert len(clear().removed) == 8
    assert contents() == []
    assert sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file()) == [
        "benchmarks/embeddings.npy",
        "notes.txt",
    ]


def test_what_is_being_written_is_kept(cache: Path) -> None:
    columns = cache / "columns" / "new.safetensors"
    lens = cache / "lenses" / "0123456789abcdef"
    with locked(columns), locked(lens / "lens.json"):
        put(unfinished(columns), 7)
        cleared = clear()
        assert {(one.kind, reason) for one, reason in cleared.kept} == {
            ("unfinished", "another process is writing it"),
            ("lenses", "another process is writing it"),
        }
        assert (lens / "lens.json").exists()
        assert len(list(columns.parent.iterdir())) == 2
    assert len(clear().removed) == 2
    assert contents() == []


def test_symbolic_links_are_removed_and_not_followed(cache: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    put(outside / "model" / "model.safetensors", 5)
    put(outside / "lenses" / "fedcba9876543210" / "lens.json", 5)
    (cache / "models" / "link").symlink_to(outside / "model")
    (cache / "models" / "minilm-12345678" / "inner").symlink_to(outside)
    (cache / "columns" / "dangling").symlink_to(outside / "nothing")
    (cache / "models" / ".link-abcdef01").symlink_to(outside)
    for path in (cache / "lenses").iterdir():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    (cache / "lenses").rmdir()
    (cache / "lenses").symlink_to(outside / "lenses")
    assert clear().kept == []
    assert contents() == []
    assert not os.path.lexists(cache / "models" / "link")
    assert sorted(str(path.relative_to(outside)) for path in outside.rglob("*") if path.is_file()) == [
        "lenses/fedcba9876543210/lens.json",
        "model/model.safetensors",
    ]


def test_a_cache_that_is_a_link_is_the_users_choice(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(cache)
    monkeypatch.setenv("GRATING_CACHE", str(tmp_path / "link"))
    assert len(contents()) == 8
    assert len(clear().removed) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kinds": ["model"]}, r"kinds=\['model'\] must be some of models, lenses"),
        ({"kinds": "models"}, r"kinds='models' must be"),
        ({"older_than": -1}, "older_than=-1 must be"),
        ({"older_than": float("nan")}, "older_than=nan must be"),
    ],
)
def test_arguments_that_make_no_sense(cache: Path, arguments: dict, message: str) -> None:
    for function in (contents, clear):
        with pytest.raises(ValueError, match=message):
            function(**arguments)
    assert len(contents()) == 8
