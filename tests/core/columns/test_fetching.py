"""Columns come in the order in which they are asked for, and what was asked for ahead is taken or dropped."""

from pathlib import Path

import numpy as np
import pytest
import torch

from grating_core.columns.companion import ColumnSizes, MlpWeights, write_columns
from grating_core.columns.disk import Disk
from grating_core.columns.fetching import SLOTS, Fetcher, Request, fetched_bytes
from grating_core.columns.reading import ColumnFile
from grating_core.errors import FileError
from grating_core.kernels.columns import unpack_columns
from grating_core.memory.checkpoint import SECTOR, aligned_buffer
from grating_core.memory.meter import Meter

SIZES = ColumnSizes(depth=2, width=64, products=300, dtype=torch.float32)  # rows of 2,432 and of 256 bytes
MEMORY = SLOTS * 4 * SECTOR


class Case:
    """A companion file whose columns are known, and what fetches them."""

    def __init__(self, directory: Path) -> None:
        chance = torch.Generator().manual_seed(0)
        shapes = ((300, 64), (300, 64), (64, 300))
        self.weights = [
            MlpWeights(*(torch.randn(shape, generator=chance) for shape in shapes)) for _ in range(SIZES.depth)
        ]
        self.path = directory / "columns.safetensors"
        write_columns(self.path, self.weights, SIZES, "mine")
        self.meter = Meter()
        self.file = ColumnFile(self.path, SIZES, "mine")
        self.fetcher = Fetcher(self.file, aligned_buffer(MEMORY), self.meter)

    def check(self, request: Request) -> None:
        """Let a request come, and compare each of its columns."""
        up, gate, down, *_ = self.weights[request.number - 1]
        matrix = torch.cat((up, gate)) if request.kind == "inputs" else down
        found = torch.full((len(request.columns), len(matrix)), torch.nan)
        for arrived in self.fetcher.arrivals(request):
            unpack_columns(SIZES.form(request.kind), arrived.memory, arrived.places, found[arrived.columns])
        assert torch.equal(found, matrix.T[request.columns])


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def test_requests_come_one_behind_the_other(case: Case) -> None:
    every = np.arange(64), np.arange(0, 300, 3)
    requests = [case.fetcher.ask(2, "inputs", every[0]), case.fetcher.ask(1, "products", every[1])]
    requests.append(case.fetcher.ask(1, "inputs", np.array([], dtype=np.int64)))
    for request in requests:
        case.check(request)
    assert case.meter.bytes_read >= 64 * SIZES.row_bytes("inputs")
    case.fetcher.close()


@pytest.mark.parametrize("reach", [1, 2 * SECTOR, 1 << 26])
def test_what_was_asked_for_ahead_is_taken_once(case: Case, reach: int) -> None:
    case.file.disk = Disk(0, 0, reach)
    own, likely = case.fetcher.ask(1, "inputs", np.arange(0, 64, 2)), np.arange(3, 60)
    case.fetcher.expect(2, "inputs", likely)
    case.fetcher.ask_ahead()
    case.check(own)
    products = case.fetcher.ask(1, "products", np.arange(300))
    case.fetcher.ask_ahead()
    case.fetcher.ask_ahead()  # of two blocks, no third is there
    assert case.fetcher.take(1, "products") == []
    case.check(products)
    ahead = case.fetcher.take(2, "inputs")
    assert case.fetcher.take(2, "inputs") == []
    columns = np.concatenate([request.columns for request in ahead])
    assert columns.tolist() == likely[: len(columns)].tolist()
    for request in ahead:
        case.check(request)
    case.check(case.fetcher.ask(2, "inputs", np.arange(64)))
    case.fetcher.close()


def test_what_is_dropped_does_not_come_and_takes_no_memory(case: Case) -> None:
    for _ in range(3 * SLOTS):
        case.fetcher.ask(1, "inputs", np.arange(64))
        case.fetcher.expect(2, "inputs", np.arange(64))
        case.fetcher.ask_ahead()
        case.fetcher.drop()
    assert case.fetcher.take(2, "inputs") == []
    case.check(case.fetcher.ask(2, "inputs", np.arange(64)))
    case.fetcher.close()


def test_after_an_error_all_is_dropped_and_it_works_again(case: Case) -> None:
    whole = case.path.read_bytes()
    case.path.write_bytes(whole[: len(whole) // 2])
    requests = [case.fetcher.ask(number, "inputs", np.arange(64)) for number in (1, 2)]
    with pytest.raises(FileError):
        [*map(case.check, requests)]
    case.path.write_bytes(whole)
    case.check(case.fetcher.ask(2, "inputs", np.arange(64)))
    case.fetcher.close()


@pytest.mark.parametrize(("largest", "wanted"), [(5000, 100), (5000, 1 << 20), (1 << 20, 100), (4096, 4096)])
def test_each_slot_has_room_for_a_column(largest: int, wanted: int) -> None:
    size = fetched_bytes(largest, wanted)
    assert size % (SLOTS * SECTOR) == 0
    assert size >= max(SLOTS * largest, wanted)
    assert size < max(SLOTS * largest, wanted) + SLOTS * SECTOR + SLOTS
