"""What reads cost is measured once for a file, and measured again when it cannot be known."""

import json
from pathlib import Path

import pytest

from grating_core.columns.disk import LONGEST_GAP, Disk, find_disk
from grating_core.errors import StorageError

FOUND = Disk(4096, 8192, 1 << 19)


class Measuring:
    """A measurement that counts how often it was made."""

    def __init__(self, disk: Disk = FOUND) -> None:
        self.disk, self.times = disk, 0

    def __call__(self) -> Disk:
        self.times += 1
        return self.disk


@pytest.fixture
def columns(tmp_path: Path) -> Path:
    path = tmp_path / "columns.safetensors"
    path.write_bytes(b"columns")
    return path


def test_a_disk_is_measured_once_for_a_file(columns: Path) -> None:
    first, second = Measuring(), Measuring(Disk(0, 0, 1))
    assert find_disk(columns, first) == find_disk(columns, second) == FOUND
    assert (first.times, second.times) == (1, 0)


def test_another_file_of_the_same_name_is_measured_again(columns: Path) -> None:
    find_disk(columns, Measuring())
    columns.unlink()
    columns.write_bytes(b"other columns")
    other = Disk(0, 0, 1 << 22)
    assert find_disk(columns, Measuring(other)) == other


def kept(columns: Path, **changes: object) -> bytes:
    find_disk(columns, Measuring())
    fields = json.loads(columns.with_suffix(".json").read_bytes())
    fields["disk"] |= changes
    return json.dumps(fields).encode()


@pytest.mark.parametrize("number", [-1, LONGEST_GAP + 1, 0.5, "4096", None, [1], True])
def test_what_no_disk_can_be_is_measured_again(columns: Path, number: object) -> None:
    columns.with_suffix(".json").write_bytes(kept(columns, inputs=number))
    measuring = Measuring(Disk(0, 0, 1))
    assert find_disk(columns, measuring) == measuring.disk


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b'{"file": 1, "disk": {}}', b"[" * 100_000, b"\xff"])
def test_a_damaged_file_is_measured_again_and_replaced(columns: Path, data: bytes) -> None:
    columns.with_suffix(".json").write_bytes(data)
    assert find_disk(columns, Measuring()) == FOUND
    assert find_disk(columns, Measuring(Disk(0, 0, 1))) == FOUND


def test_unknown_fields_are_measured_again(columns: Path) -> None:
    columns.with_suffix(".json").write_bytes(kept(columns, heads=4))
    assert find_disk(columns, Measuring(Disk(0, 0, 1))) == Disk(0, 0, 1)


def test_where_nothing_can_be_kept_the_disk_is_measured_each_time(
    columns: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, data: bytes) -> None:
        raise StorageError("no room")

    monkeypatch.setattr("grating_core.columns.disk.replace_file", refuse)
    assert find_disk(columns, Measuring()) == FOUND
    assert find_disk(columns, Measuring(Disk(0, 0, 1))) == Disk(0, 0, 1)
    assert [path.name for path in columns.parent.iterdir()] == [columns.name]


def test_a_file_that_went_away_is_measured_and_nothing_is_kept(tmp_path: Path) -> None:
    assert find_disk(tmp_path / "columns.safetensors", Measuring()) == FOUND
    assert not list(tmp_path.iterdir())
