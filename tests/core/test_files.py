"""The cache's place, files that are written as a whole by one process at a time, and JSON that is not trusted."""

import errno
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from grating_core.errors import StorageError
from grating_core.files import (
    cache_directory,
    locked,
    parse_json,
    read_json,
    replace_file,
    replacing,
    require_room,
)
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


HOLD = """
import sys, time
from pathlib import Path
from grating_core.files import locked, unfinished
path = Path(sys.argv[1])
with locked(path):
    unfinished(path).write_bytes(b"half")
    print("held", flush=True)
    time.sleep(60)
"""


def holder(path: Path) -> subprocess.Popen[str]:
    """A process that is writing a file."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_is_locked_is_written_by_one_process_and_one_thread_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "file"
    process = holder(path)
    try:
        with locked(path, wait=False) as alone:
            assert not alone
        with locked(tmp_path / "another", wait=False) as alone:
            assert alone
        assert len(list(tmp_path.glob(".file-*"))) == 1  # the living keep what they are writing
    finally:
        kill(process)
    with locked(path):
        assert not list(tmp_path.glob(".file-*"))
        with ThreadPoolExecutor(1) as pool:
            assert not pool.submit(lambda: locked(path, wait=False).__enter__()).result()
    assert not names(tmp_path)


def test_the_lock_goes_to_who_waits_when_its_process_is_killed(tmp_path: Path) -> None:
    process = holder(tmp_path / "file")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(replace_file, tmp_path / "file", b"whole")
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.2)
        kill(process)
        waiting.result(timeout=10)
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_a_child_of_a_fork_does_not_keep_its_parents_lock(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with locked(path):
        child = os.fork()
        if not child:
            time.sleep(30)
            os._exit(0)
    try:
        with locked(path, wait=False) as alone:
            assert alone
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_only_what_is_unfinished_of_this_file_is_removed(tmp_path: Path) -> None:
    others = [".a-b-12345678", ".a.txt-12345678", "a-12345678", ".a-123456789", ".aa-12345678", ".a-1234_A78"]
    for name in (*others, ".a-12345678", ".a-0x_y1234"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".a-deadbeef" / "inside").mkdir(parents=True)
    with locked(tmp_path / "a"):
        assert names(tmp_path) == sorted([*others, ".a.lock"])


def test_where_there_are_no_locks_only_what_is_old_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    for name, age in ((".a-11111111", 0), (".a-22222222", 7200)):
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    with locked(tmp_path / "a"):
        replace_file(tmp_path / "b", b"written all the same")
    assert names(tmp_path) == [".a-11111111", "b"]


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
