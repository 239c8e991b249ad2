"""The cache's place, files that are written as a whole, and JSON that is not trusted."""

import os
from pathlib import Path

import pytest

from grating_core.errors import StorageError
from grating_core.files.locks import locked
from grating_core.files.places import cache_directory
from grating_core.files.reading import parse_json, read_json
from grating_core.files.writing import replace_file, replacing, require_room
from tests.core.faults import largest_file


@pytest.mark.parametrize("text", ["", "{", b"\xff", "[" * 100_000, '{"a":' * 100_000, "9" * 5_000])
def test_what_is_not_json_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_json(text)


def test_a_named_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(OSError, match="not a regular file"):
        read_json(tmp_path / "config.json")


def test_what_a_file_holds(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"ä": [1, null]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"ä": [1, None]}
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "b.json")


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize(
    ("umask", "private", "mode"), [(0o022, False, 0o644), (0o002, False, 0o664), (0, True, 0o600)]
)
def test_who_may_read_a_file(tmp_path: Path, umask: int, private: bool, mode: int) -> None:
    before = os.umask(umask)
    try:
        replace_file(tmp_path / "file", b"text", private=private)
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


def test_a_file_that_is_not_written_to_its_end_leaves_what_was_there(tmp_path: Path) -> None:
    replace_file(tmp_path / "file", b"old")

    def interrupted() -> None:
        with locked(tmp_path / "file"), replacing(tmp_path / "file") as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_full_disk_is_told_with_the_place_and_the_bytes_before_anything_is_written(tmp_path: Path) -> None:
    path, size = tmp_path / "file", 100_000
    with largest_file(size // 2):
        with pytest.raises(
            StorageError, match=rf"{path} cannot be written: .*takes 0\.1 MB, and .* MB are free in"
        ):
            require_room(path, size)
        with locked(path), pytest.raises(StorageError, match=r"takes 0\.1 MB"), replacing(path, size):
            pytest.fail("there is no room")
        with pytest.raises(StorageError, match=r"cannot be written"), locked(path), replacing(path) as file:
            file.write(bytes(size))
        require_room(path, size // 2)
    assert not names(tmp_path)


def test_the_cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRATING_CACHE", "here")
    assert cache_directory() == tmp_path / "here"
    monkeypatch.setenv("GRATING_CACHE", "~root/there")
    assert cache_directory() == Path("/root/there")
    monkeypatch.setenv("GRATING_CACHE", "~no-such-user")
    with pytest.raises(StorageError, match=r"~no-such-user.*: have GRATING_CACHE name one"):
        cache_directory()
