import shutil
from dataclasses import replace
from io import FileIO
from itertools import count
from pathlib import Path
from time import sleep
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from grating_core.columns import reading
from grating_core.columns.companion import KINDS, ColumnSizes, Kind, MlpWeights, write_columns
from grating_core.columns.disk import LONGEST_GAP, Disk, fit_gap, fit_reach
from grating_core.columns.reading import LONGEST_READ, ColumnFile
from grating_core.errors import FileError, StorageError
from grating_core.kernels.columns import unpack_columns
from grating_core.memory import checkpoint
from grating_core.memory.checkpoint import SECTOR, aligned_buffer
from grating_core.memory.pieces import Pieces
from grating_core.memory.positioned import read_at

SIZES = ColumnSizes(depth=3, width=24, products=40, dtype=torch.float32)


def random_weights(sizes: ColumnSizes, seed: int = 0) -> list[MlpWeights]:
    chance = torch.Generator().manual_seed(seed)
    shapes = ((sizes.products, sizes.width),) * 2 + ((sizes.width, sizes.products),)
    return [
        MlpWeights(*(torch.randn(shape, generator=chance).to(sizes.dtype) for shape in shapes))
        for _ in range(sizes.depth)
    ]


def written(directory: Path, sizes: ColumnSizes = SIZES, fingerprint: str = "mine") -> Path:
    path = directory / "columns.safetensors"
    write_columns(path, random_weights(sizes), sizes, fingerprint)
    return path


def read(file: ColumnFile, number: int, kind: Kind, columns: list[int], staging: int = 1 << 22) -> Tensor:
    """Columns as float32, read block by block."""
    buffer, chosen = aligned_buffer(staging), np.array(columns)
    found = torch.full((len(columns), file.sizes.form(kind).length), torch.nan)
    for planned in file.plan(number, kind, chosen, staging // 2):
        buffer.fill_(255)
        block = planned.into(buffer.numpy())
        file.begin(number, kind, block).finish()
        file.verify(number, kind, chosen, block)
        unpack_columns(file.sizes.form(kind), buffer, block.places, found[block.columns])
    return found


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, None), (torch.bfloat16, None), (torch.float32, 8)])
def test_every_column_is_where_it_belongs(tmp_path: Path, dtype: torch.dtype, bits: int | None) -> None:
    sizes = ColumnSizes(depth=3, width=24, products=1100, dtype=dtype, bits=bits)
    file = ColumnFile(written(tmp_path, sizes), sizes, "mine")
    near = {"atol": 0.0 if bits is None else 0.03, "rtol": 0.0}
    for number, (up, gate, down, *_) in enumerate(random_weights(sizes), 1):
        for staging in (1 << 22, 2 * 5 * SECTOR):  # all at once, or a column or two in each block
            for columns in ([5], list(range(24)), [0, 1, 2, 9, 11, 23]):
                expected = torch.cat((up, gate)).T[columns].float()
                torch.testing.assert_close(read(file, number, "inputs", columns, staging), expected, **near)
            for columns in ([1099], list(range(1100)), [0, 700, 701], list(range(0, 1100, 7))):
                expected = down.T[columns].float()
                torch.testing.assert_close(read(file, number, "products", columns, staging), expected, **near)
    file.close()


def test_entries_of_4_bits_whose_errors_count_are_nearer(tmp_path: Path) -> None:
    sizes = ColumnSizes(depth=1, width=24, products=64, dtype=torch.float32, bits=4)
    (plain,) = random_weights(sizes)
    counts = torch.tensor([1.0, 0.01]).repeat(64)  # every other entry
    columns = torch.cat((plain.up, plain.gate)).T
    errors = []
    for number, weights in enumerate((plain, plain._replace(input_errors=counts))):
        path = tmp_path / str(number)
        write_columns(path, [weights], sizes, "mine")
        file = ColumnFile(path, sizes, "mine")
        errors.append((read(file, 1, "inputs", list(range(24))) - columns).square().mean(0))
        file.close()
    before, after = errors
    assert after[::2].mean() < 0.9 * before[::2].mean()
    assert after[1::2].mean() > before[1::2].mean()


def test_long_runs_are_cut_and_neighbours_are_read_together(tmp_path: Path) -> None:
    sizes = ColumnSizes(depth=1, width=1024, products=2048, dtype=torch.float32)  # rows of 16 and of 4 KiB
    file = ColumnFile(written(tmp_path, sizes), sizes, "mine")
    file.sector = SECTOR
    (block,) = file.plan(1, "products", np.array([0, 1, 3, 8, 9, 10, 19]), 1 << 26)
    assert (block.reads.sizes // SECTOR).tolist() == [2, 1, 3, 1]
    (block,) = file.plan(1, "inputs", np.arange(100), 1 << 26)
    assert block.reads.sizes.tolist() == [LONGEST_READ] * 3 + [64 << 10]
    assert not list(file.plan(1, "inputs", np.array([], dtype=np.int64), 1 << 26))
    assert file.measure() == Disk()  # this file is too short to be measured
    file.disk = Disk(8 << 10, 8 << 10)
    assert (file.cost("inputs"), file.cost("products")) == (0.5, 2)
    file.close()


@pytest.mark.parametrize(
    ("seconds", "gap"),
    [(4096 / 1.2e9, 0), (1e-6, 0), (7e-6, SECTOR), (5.4e-6, SECTOR), (25e-6, 8 * SECTOR), (1.0, LONGEST_GAP)],
)
def test_a_gap_takes_as_long_as_another_read(seconds: float, gap: int) -> None:
    assert fit_gap(seconds, SECTOR, 1.2e9) == gap


def test_a_column_that_is_longer_than_what_a_read_costs_has_no_gap() -> None:
    seconds = 20e-6  # a slow disk takes these for 11,000 bytes, and for any fewer
    assert fit_gap(seconds, 11_000, 550e6) == 0
    assert fit_gap(seconds, 1_536, 550e6) == 2 * SECTOR
    assert fit_reach(550e6) == 1 << 19


@pytest.mark.parametrize("sector", [512, SECTOR])
def test_columns_are_read_in_sectors_that_the_disk_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sector: int
) -> None:
    def refuse(file: FileIO, start: int, views: list[memoryview]) -> int:
        if start % sector:
            raise OSError(22, "Invalid argument")
        return read_at(file, start, views)

    monkeypatch.setattr(checkpoint, "read_at", refuse)
    sizes = ColumnSizes(1, 2560, 64, torch.float32, 4)  # rows of 1,472 bytes for products
    file = ColumnFile(written(tmp_path, sizes), sizes, "mine")
    assert file.sector == sector
    (block,) = file.plan(1, "products", np.array([0, 40]), 1 << 20)
    assert (block.reads.starts % sector == 0).all()
    assert (block.reads.sizes <= 1472 + 2 * sector).all()
    file.close()


def test_a_disk_is_measured_by_reading_the_file(tmp_path: Path) -> None:
    sizes = ColumnSizes(depth=2, width=1024, products=4096, dtype=torch.float32)
    file = ColumnFile(written(tmp_path, sizes), sizes, "mine")
    disk = file.measure()
    assert all(0 <= gap <= LONGEST_GAP and gap % SECTOR == 0 for gap in disk.gaps)
    assert disk.reach > 1 << 14
    file.close()


@pytest.mark.parametrize(
    ("seconds", "least", "most"),
    [
        (30e-6, SECTOR, 4 * SECTOR),  # a long read takes 1 ms more than a sector, so 2 sectors are a read
        (2e-3, LONGEST_GAP // 2, LONGEST_GAP),  # a read takes longer than its bytes
    ],
)
def test_a_cold_disk_and_new_threads_do_not_make_gaps_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, least: int, most: int
) -> None:
    calls = count()

    class SlowReading:
        def __init__(self, file: int, pieces: Pieces) -> None:
            self.sizes = pieces.sizes

        def wait(self) -> int:
            is_cold = next(calls) in (0, 1, 5)
            sleep(0.1 * is_cold + float(np.sum(seconds + self.sizes * (1e-3 / (256 << 10)))))
            return len(self.sizes)

    monkeypatch.setattr(reading, "begin_reading", SlowReading)
    sizes = ColumnSizes(depth=2, width=1024, products=4096, dtype=torch.float32)
    file = ColumnFile(written(tmp_path, sizes), sizes, "mine")
    assert all(least <= gap <= most for gap in file.measure().gaps)
    file.close()


def test_the_file_is_ordinary_safetensors_and_begins_at_a_sector(tmp_path: Path) -> None:
    path = written(tmp_path)
    tensors = load_file(path)
    assert tensors["2.inputs"].shape == (24, 320)
    assert torch.equal(tensors["2.inputs"].view(torch.float32)[7], torch.cat(random_weights(SIZES)[1][:2]).T[7])
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
    start = 8 + int.from_bytes(data[:8], "little") + 3 * 320  # row 3 of layer 1's inputs
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
    with pytest.raises(StorageError, match=r"it takes 0\.0 MB, and 0\.0 MB are free in .*GRATING_CACHE"):
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


@pytest.mark.parametrize(("bits", "inputs", "products"), [(None, 38912, 5120), (8, 20672, 2752), (4, 11008, 1472)])
def test_sizes_say_what_rows_take(bits: int | None, inputs: int, products: int) -> None:
    sizes = ColumnSizes(36, 2560, 9728, torch.bfloat16, bits)
    assert {kind: sizes.row_bytes(kind) for kind in KINDS} == {"inputs": inputs, "products": products}
    assert sizes.layer_bytes == 2560 * inputs + 9728 * products


@pytest.mark.parametrize("bits", [8, 4])
def test_columns_in_other_bits_are_refused(tmp_path: Path, bits: int) -> None:
    path = written(tmp_path)
    with pytest.raises(FileError, match=r"another shape.*delete the file"):
        ColumnFile(path, replace(SIZES, bits=bits), "mine")


@pytest.mark.parametrize("order", [[0, 1, 2, 2], [0, 1, 2, 4], [-1, 1, 2, 3]])
def test_an_order_without_a_column_is_refused(tmp_path: Path, order: list[int]) -> None:
    sizes = ColumnSizes(depth=1, width=4, products=32, dtype=torch.float32)
    weights = [layer._replace(inputs=np.array(order)) for layer in random_weights(sizes)]
    weights[0] = weights[0]._replace(up=torch.zeros(32, 5), gate=torch.zeros(32, 5))
    write_columns(tmp_path / "columns", weights, sizes, "mine")
    with pytest.raises(FileError, match=r"1\.inputs\.order does not have each column once.*delete the file"):
        ColumnFile(tmp_path / "columns", sizes, "mine")
