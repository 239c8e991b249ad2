import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from grating_core.columns.companion import KINDS, ColumnFile, ColumnSizes, Kind, write_columns
from grating_core.errors import FileError, StorageError
from grating_core.memory.checkpoint import SECTOR, aligned_buffer

SIZES = ColumnSizes(depth=3, width=24, products=40, dtype=torch.float32)


def random_weights(sizes: ColumnSizes, seed: int = 0) -> list[tuple[Tensor, Tensor, Tensor]]:
    chance = torch.Generator().manual_seed(seed)
    shapes = ((sizes.products, sizes.width),) * 2 + ((sizes.width, sizes.products),)
    return [
        tuple(torch.randn(shape, generator=chance).to(sizes.dtype) for shape in shapes)  # type: ignore[misc]
        for _ in range(sizes.depth)
    ]


def written(directory: Path, sizes: ColumnSizes = SIZES, fingerprint: str = "mine") -> Path:
    path = directory / "columns.safetensors"
    write_columns(path, random_weights(sizes), sizes, fingerprint)
    return path


def read(file: ColumnFile, number: int, kind: Kind, columns: list[int]) -> Tensor:
    row = file.sizes.row_bytes(kind)
    buffer = aligned_buffer(len(columns) * row)
    view = memoryview(buffer.numpy())
    places = [view[at : at + row] for at in range(0, len(columns) * row, row)]
    for part in file.read(number, kind, np.array(columns), places):
        part.result()
    return buffer[: len(columns) * row].view(file.sizes.dtype).view(len(columns), -1)[:, : file.sizes.used(kind)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_column_is_where_it_belongs(tmp_path: Path, dtype: torch.dtype) -> None:
    sizes = ColumnSizes(depth=3, width=24, products=1100, dtype=dtype)
    file = ColumnFile(written(tmp_path, sizes), sizes, "mine")
    for number, (up, gate, down) in enumerate(random_weights(sizes), 1):
        for columns in ([5], list(range(24)), [0, 1, 2, 9, 11, 23]):
            assert torch.equal(read(file, number, "inputs", columns), torch.cat((up, gate)).T[columns])
        for columns in ([1099], list(range(1100)), [0, 700, 701]):
            assert torch.equal(read(file, number, "products", columns), down.T[columns])
    file.close()


def test_the_file_is_ordinary_safetensors_and_rows_begin_at_sectors(tmp_path: Path) -> None:
    path = written(tmp_path)
    tensors = load_file(path)
    assert tensors["2.inputs"].shape == (24, SECTOR // 4)
    assert torch.equal(tensors["2.inputs"][7, :80], torch.cat(random_weights(SIZES)[1][:2]).T[7])
    assert not tensors["2.inputs"][:, 80:].any()
    assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % SECTOR == 0


def test_columns_of_other_weights_are_refused_and_the_way_out_is_told(tmp_path: Path) -> None:
    path = written(tmp_path)
    with pytest.raises(FileError, match=r"other weights.*delete the file"):
        ColumnFile(path, SIZES, "yours")
    with pytest.raises(FileError, match="another shape"):
        ColumnFile(path, ColumnSizes(3, 24, 41, torch.float32), "mine")


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:5000], lambda data: b"", bytes.swapcase]
)
def test_a_damaged_file_is_refused(tmp_path: Path, damage: object) -> None:
    path = written(tmp_path)
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(FileError, match="delete the file"):
        ColumnFile(path, SIZES, "mine")


def test_a_header_that_is_nested_deeply_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path)
    path.write_bytes((100_000).to_bytes(8, "little") + b"[" * 100_000)
    with pytest.raises(FileError, match="nested too deeply"):
        ColumnFile(path, SIZES, "mine")


def test_a_flipped_bit_is_found_when_its_column_is_first_read(tmp_path: Path) -> None:
    path = written(tmp_path)
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little") + 3 * SECTOR  # row 3 of layer 1's inputs
    data[start + 17] ^= 1
    path.write_bytes(data)
    file = ColumnFile(path, SIZES, "mine")
    read(file, 1, "inputs", [2, 4])
    with pytest.raises(FileError, match=r"column 3 of 1\.inputs is damaged; delete the file"):
        read(file, 1, "inputs", [2, 3, 4])
    file.close()


def test_a_file_that_goes_away_is_missed_and_found_again(tmp_path: Path) -> None:
    path = written(tmp_path)
    file = ColumnFile(path, SIZES, "mine")
    first = read(file, 2, "products", [1, 30]).clone()
    whole = path.read_bytes()
    path.write_bytes(whole[:SECTOR])
    with pytest.raises(FileError, match=r"cut short|ends at byte"):
        read(file, 2, "products", [1, 30])
    path.write_bytes(whole)
    assert torch.equal(read(file, 2, "products", [1, 30]), first)
    file.close()


def test_no_room_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRATING_CACHE", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(StorageError, match=r"it takes 0\.8 MB, and 0\.0 MB are free in .*GRATING_CACHE"):
        written(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_while_writing_leaves_nothing_behind(tmp_path: Path) -> None:
    def layers() -> object:
        yield random_weights(SIZES)[0]
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="No space left"):
        write_columns(tmp_path / "columns", layers(), SIZES, "mine")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_an_interrupted_writing_leaves_nothing_behind(tmp_path: Path) -> None:
    def layers() -> object:
        yield random_weights(SIZES)[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_columns(tmp_path / "columns", layers(), SIZES, "mine")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_sizes_say_what_is_used_and_what_is_read() -> None:
    sizes = ColumnSizes(36, 2560, 9728, torch.bfloat16)
    assert {kind: sizes.used(kind) for kind in KINDS} == {"inputs": 19456, "products": 2560}
    assert {kind: sizes.row_bytes(kind) for kind in KINDS} == {"inputs": 40960, "products": 8192}
    assert sizes.layer_bytes == 3 * 2560 * 9728 * 2
