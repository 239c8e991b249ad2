"""Kernels of dynamic input pruning against their references, at every level of this processor."""

from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grating_core.kernels import columns, compiled_columns
from grating_core.kernels.columns import RowFormat, pack_columns
from grating_core.kernels.loading import KernelsError, levels, start

FORMATS = [(torch.float32, None), (torch.bfloat16, None), (torch.float32, 8), (torch.float32, 4)]


@pytest.fixture(params=["best", "others"])
def level(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """The names of the processor's levels: the best one, or all others."""
    try:
        found = levels()
    except KernelsError as error:
        pytest.skip(str(error))
    threads = torch.get_num_threads()
    yield found[:1] if request.param == "best" else found[1:]
    torch.set_num_threads(threads)
    start()


def table_of(rows: Tensor, form: RowFormat, first: int = 128) -> tuple[Tensor, np.ndarray]:
    """A table whose rows begin somewhere, and their places."""
    data = torch.from_numpy(pack_columns(rows, form))
    table = torch.cat((torch.zeros(first, dtype=torch.uint8), data.flatten()))
    return table, first + form.row_bytes * np.arange(len(rows))


@pytest.mark.parametrize(("dtype", "bits"), FORMATS)
@pytest.mark.parametrize("length", [1, 31, 48, 160, 1000, 4133])
def test_sums_and_states_are_the_references(
    level: list[str], dtype: torch.dtype, bits: int | None, length: int
) -> None:
    torch.manual_seed(length)
    form = RowFormat(length, dtype, bits)
    table, places = table_of(torch.randn(60, length), form)
    chosen = places[np.random.default_rng(length).permutation(60)[:29]]
    values = np.random.default_rng(0).normal(size=29).astype(np.float32)
    expected, states = torch.ones(length), torch.empty(29, length)
    columns.add_columns(form, table, chosen, values, expected)
    columns.unpack_columns(form, table, chosen, states)
    for name in level:
        start(name)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found = torch.ones(length)
            compiled_columns.add_columns(form, table, chosen, values, found)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
            for as_dtype in (torch.float32, torch.bfloat16):
                unpacked = torch.empty(29, length, dtype=as_dtype)
                compiled_columns.unpack_columns(form, table, chosen, unpacked)
                torch.testing.assert_close(
                    unpacked.float(), states, atol=1e-6, rtol=1e-6 if as_dtype == torch.float32 else 8e-3
                )


@pytest.mark.parametrize(("dtype", "bits"), FORMATS)
def test_no_rows_add_nothing(dtype: torch.dtype, bits: int | None) -> None:
    form = RowFormat(48, dtype, bits)
    table, none = torch.zeros(form.row_bytes, dtype=torch.uint8), np.empty(0, dtype=np.int64)
    output = torch.ones(48)
    columns.add_columns(form, table, none, np.empty(0, dtype=np.float32), output)
    columns.unpack_columns(form, table, none, torch.empty(0, 48))
    assert output.tolist() == [1.0] * 48


@pytest.mark.parametrize(("bits", "error"), [(8, 1 / 254), (4, 2 / 30)])
def test_quantised_rows_are_close_to_the_columns(bits: int, error: float) -> None:
    """The most error of a group, or with 4 bits, whose range may be cut, its typical one: half a step."""
    torch.manual_seed(1)
    rows = torch.randn(20, 96) * torch.rand(20, 1).exp()
    rows[3] = 0
    form = RowFormat(96, torch.float32, bits)
    table, places = table_of(rows, form)
    found = torch.empty(20, 96)
    columns.unpack_columns(form, table, places, found)
    peak = rows.view(20, 3, 32).abs().amax(-1)
    off = (found - rows).view(20, 3, 32)
    error_of = off.square().mean(-1).sqrt() if bits == 4 else off.abs().amax(-1)
    assert (error_of <= 1.01 * error * peak + 1e-6).all()
    assert not found[3].any()


def test_bytes_of_rows() -> None:
    assert RowFormat(19456, torch.bfloat16).row_bytes == 38912
    assert RowFormat(19456, torch.bfloat16, 8).row_bytes == 19456 + 608 * 2
    assert RowFormat(2560, torch.bfloat16, 4).row_bytes == 1472  # 1,448, in whole lines
    assert RowFormat(33, torch.float32, 4).row_bytes == 64
    assert RowFormat(1, torch.float32).row_bytes == 64


@settings(deadline=None)
@given(
    size=st.integers(1, 60),
    share=st.floats(0, 1),
    density=st.floats(0.01, 1),
    preference=st.sampled_from([1.0, 0.3]),
    ties=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_choices_are_the_references(
    size: int, share: float, density: float, preference: float, ties: bool, seed: int
) -> None:
    try:
        start()
    except KernelsError as error:
        pytest.skip(str(error))
    chance = np.random.default_rng(seed)
    resident, count = round(share * size), max(1, round(density * size))
    for cost in (0.0, 0.4, 3.0, 1e9):
        values = chance.normal(size=size).astype(np.float32)
        if ties:
            values = values.round()
        expected = columns.choose(values, resident, count, preference, cost)
        found = compiled_columns.choose(values, resident, count, preference, cost)
        assert found.hits == expected.hits
        assert found.places.tolist() == expected.places.tolist()


@given(worth=st.lists(st.integers(-8, 8), max_size=9), cost=st.integers(0, 6), resident=st.integers(0, 3))
def test_the_runs_that_are_read_are_the_best(worth: list[int], cost: int, resident: int) -> None:
    # The least magnitude that is chosen is 1: with a count of so many columns, the last of which is just chosen.
    magnitudes = np.sqrt(
        np.array([*[9.0] * resident, *(max(0, gain + 8) / 8 for gain in worth), 1.0], dtype=np.float64)
    )
    values = magnitudes.astype(np.float32)
    count = int((values >= 1).sum())
    found = columns.choose(values, resident, count, 1.0, cost / 8)
    gains = np.square(values[resident:].astype(np.float64)) - 1

    def total(used: np.ndarray) -> float:
        begins = used & ~np.concatenate(([False], used[:-1]))
        return float(gains[used].sum() - begins.sum() * cost / 8)

    used = np.zeros(len(gains), dtype=bool)
    used[found.places[found.hits :] - resident] = True
    best = max(total(np.array(bits)) for bits in product([False, True], repeat=len(gains)))
    assert total(used) == pytest.approx(best, abs=1e-6)
    assert found.places[: found.hits].tolist() == list(range(resident))
