"""A disk that fails while requests run: an error that says what, and the next call works once all is well."""

import errno
import gc
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from grating_core import Reranker
from grating_core.errors import FileError, StorageError
from grating_core.memory import hidden, positioned
from grating_core.memory.checkpoint import Checkpoint
from tests.core.conftest import save_model
from tests.core.memory.conftest import load_planned

QUERY = "w1 w2"
DOCUMENTS = [" ".join(f"w{(7 * n + m) % 200}" for m in range(10 + n)) for n in range(12)]


@pytest.fixture
def directory(tiny_bert: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bert, tmp_path / "model"))


def rerank_several(planned: Reranker) -> None:
    """More than one request: what was read ahead before the damage is whole."""
    for number in range(3):
        planned.rerank(f"w{50 + number} w{60 + number}", DOCUMENTS)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def overwrite(path: Path) -> None:
    """Another model of the same shape, written into the same file."""
    other = save_model(path.parent / "other", "bert", seed=1)
    path.write_bytes((other / path.name).read_bytes())


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("changes", [{"resident": ()}, {"embedding_rows": 7}], ids=["layers", "rows"])
@pytest.mark.parametrize("damage", [cut, overwrite, empty])
def test_a_file_that_changes_is_noticed_and_may_come_back(directory: Path, changes, damage) -> None:
    planned = load_planned(directory, **changes)
    expected = planned.rerank(QUERY, DOCUMENTS).ranking
    path = directory / "model.safetensors"
    intact = path.read_bytes()
    damage(path)
    for _ in range(2):
        with pytest.raises(FileError, match=r"model\.safetensors.*bert\.(encoder|embeddings)"):
            rerank_several(planned)
    path.write_bytes(intact)
    assert planned.rerank(QUERY, DOCUMENTS).ranking == expected
    path.unlink()
    path.write_bytes(intact)
    assert planned.rerank(QUERY, DOCUMENTS).ranking == expected


def test_a_deleted_file_is_still_open(directory: Path) -> None:
    planned = load_planned(directory, resident=(), embedding_rows=7)
    expected = planned.rerank(QUERY, DOCUMENTS).ranking
    shutil.rmtree(directory)
    assert planned.rerank(QUERY, DOCUMENTS).ranking == expected


def rerank_again(planned: Reranker, documents: list[str]) -> None:
    """More than once: what was read ahead before the swap is what it was."""
    for _ in range(3):
        planned.rerank(QUERY, documents)


def other_model(path: Path) -> bytes:
    return (save_model(path.parent / "other", "bert", seed=1) / path.name).read_bytes()


def other_bytes(name: str) -> Callable[[Path], bytes]:
    """Two bytes are others, behind the beginning of a tensor."""

    def change(path: Path) -> bytes:
        tensor = Checkpoint([path]).tensors[name]
        data, place = bytearray(path.read_bytes()), tensor.start + 4 * 32 * 3 + 66  # in its fourth row
        data[place : place + 2] = bytes(byte ^ 0x55 for byte in data[place : place + 2])
        return bytes(data)

    return change


@pytest.mark.parametrize(
    "swap",
    [
        other_model,
        other_bytes("bert.encoder.layer.2.attention.output.dense.weight"),
        other_bytes("bert.embeddings.word_embeddings.weight"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # as stored, and converted in pieces
def test_a_swap_that_keeps_size_and_time_is_noticed(directory: Path, swap, dtype) -> None:
    planned = load_planned(directory, resident=(), embedding_rows=7, dtype=dtype)
    documents = [*DOCUMENTS, "<pad> <s> </s> <unk>"]  # the first rows of the table
    expected = planned.rerank(QUERY, documents).ranking
    path = directory / "model.safetensors"
    intact, status, other = path.read_bytes(), path.stat(), swap(path)
    assert len(other) == len(intact)
    path.write_bytes(other)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    for _ in range(2):
        with pytest.raises(FileError, match=r"model\.safetensors.*has changed since it was opened"):
            rerank_again(planned, documents)
    path.write_bytes(intact)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert planned.rerank(QUERY, documents).ranking == expected


def test_the_same_file_by_other_times_names_and_permissions_goes_on(directory: Path) -> None:
    planned = load_planned(directory, resident=(), embedding_rows=7)
    expected = planned.rerank(QUERY, DOCUMENTS).ranking
    path = directory / "model.safetensors"
    for change in (
        lambda: path.chmod(0o400),
        path.touch,
        lambda: os.link(path, directory / "link"),
        lambda: path.rename(directory / "renamed"),
        lambda: (directory / "renamed").unlink(),
    ):
        change()
        assert planned.rerank(QUERY, DOCUMENTS).ranking == expected


def test_a_read_error_names_file_and_tensor(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = load_planned(directory, resident=())
    expected = planned.rerank(QUERY, DOCUMENTS).ranking

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(positioned, "read_at", fail)
        with pytest.raises(FileError, match=r"model\.safetensors: reading bert\.encoder.*Input/output error"):
            rerank_several(planned)
    assert planned.rerank(QUERY, DOCUMENTS).ranking == expected


def test_a_full_disk_is_told_before_computing(
    directory: Path, spill_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = load_planned(directory, hidden_tokens=0)
    expected = planned.rerank(QUERY, DOCUMENTS).ranking

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "posix_fallocate", full)
        with pytest.raises(StorageError, match=r"cache.*No space left on device.*memory_budget"):
            planned.rerank(QUERY, DOCUMENTS)
    with monkeypatch.context() as broken:
        broken.setattr(hidden, "write_at", full)
        with pytest.raises(StorageError, match="No space left on device"):
            planned.rerank(QUERY, DOCUMENTS)
    assert planned.rerank(QUERY, DOCUMENTS).ranking == expected
    assert list(spill_directory.iterdir()) == []


def test_the_spill_file_has_no_name_while_it_is_used(tiny_bert: Path, spill_directory: Path) -> None:
    seen = []

    class Look:
        def route(self, layer, scores, top_k):
            seen.extend(spill_directory.iterdir())
            return ["deferred"] * len(scores)

    planned = load_planned(tiny_bert, hidden_tokens=0, pruning=Look())
    assert planned.rerank(QUERY, DOCUMENTS, 2).trace.bytes_spilled > 0
    assert seen == []


def test_a_place_that_cannot_be_written_is_named(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("GRATING_CACHE", str(tmp_path / "file"))
    planned = load_planned(tiny_bert, hidden_tokens=0)
    with pytest.raises(StorageError, match="file"):
        planned.rerank(QUERY, DOCUMENTS)


def test_close_stops_threads_and_closes_files(tiny_bert: Path, spill_directory: Path) -> None:
    files = Path("/proc/self/fd")
    gc.collect()  # what earlier tests have left is not to be closed meanwhile
    before = len(list(files.iterdir())) if files.is_dir() else 0
    others = set(threading.enumerate())
    with load_planned(tiny_bert, resident=(), embedding_rows=7, hidden_tokens=0) as planned:
        planned.rerank(QUERY, DOCUMENTS)
        assert any(thread.name.startswith("grating") for thread in set(threading.enumerate()) - others)
    assert set(threading.enumerate()) <= others
    if before:
        assert len(list(files.iterdir())) == before
    with pytest.raises(RuntimeError, match="closed"):
        planned.rerank(QUERY, DOCUMENTS)
