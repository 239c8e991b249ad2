"""The row cache against the table."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from grating_core.memory.checkpoint import Checkpoint
from grating_core.memory.meter import Meter
from grating_core.memory.rows import RowCache

VOCABULARY = 3000


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.Tensor, Path]:
    path = tmp_path_factory.mktemp("table") / "t.safetensors"
    rows = torch.randn(VOCABULARY, 6, generator=torch.Generator().manual_seed(0))
    save_file({"before": torch.zeros(3), "table": rows}, path)
    return rows, path


def cache(path: Path, capacity: int, dtype: torch.dtype = torch.float32) -> tuple[RowCache, Meter]:
    checkpoint, meter = Checkpoint([path], lasting=True), Meter()
    rows = RowCache(
        checkpoint, checkpoint.tensors["table"], capacity=capacity, dtype=dtype, device=torch.device("cpu"),
        meter=meter,
    )  # fmt: skip
    return rows, meter


tokens = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=900)


@given(st.integers(1, 800), st.lists(tokens, min_size=1, max_size=4))
def test_rows_are_those_of_the_table(table, capacity: int, requests: list[list[int]]) -> None:
    expected, path = table
    for dtype in (torch.float32, torch.bfloat16):
        rows, _ = cache(path, capacity, dtype)
        for request in requests:
            ids = torch.tensor(request)
            rows.fetch(ids)
            assert torch.equal(rows(ids[None]), expected[ids][None].to(dtype))


def test_the_row_used_longest_ago_makes_room(table) -> None:
    rows, meter = cache(table[1], 3)
    for token in (1, 2, 3, 1, 4):  # 4 evicts 2
        rows.fetch(torch.tensor([token]))
    assert meter.rows_read == 4
    rows.fetch(torch.tensor([1, 3, 4]))
    assert meter.rows_read == 4
    rows.fetch(torch.tensor([2]))
    assert meter.rows_read == 5
    assert meter.hit_rate == pytest.approx(1 - 5 / 9)


def test_neighbours_share_a_read(table, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = cache(table[1], 1000)
    reads, read = [], Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda *what: (reads.append(what), read(*what)))
    rows.fetch(torch.tensor([5, 7, 6, 20, 2500]))
    assert len(reads) == 2
