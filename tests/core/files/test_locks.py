"""One process at a time writes a file, and what dead processes left is removed."""

import errno
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from grating_core.files.locks import locked
from grating_core.files.writing import replace_file


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


HOLD = """
import sys, time
from pathlib import Path
from grating_core.files.locks import locked, unfinished
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
