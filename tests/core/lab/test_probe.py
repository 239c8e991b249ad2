"""Measuring this machine; how long anything takes is not tested."""

from math import isfinite
from pathlib import Path

import pytest
import torch

from grating_core.files.places import cache_directory
from grating_core.lab.probe import measure
from grating_core.lab.shape import Shape
from grating_core.lab.simulator import simulate_dense


@pytest.mark.parametrize(("bits", "kv_bits"), [(None, None), (8, None), (4, 8)])
def test_all_costs_are_found_and_nothing_is_left(
    decoder_directory: Path, spill_directory: Path, bits: int | None, kv_bits: int | None
) -> None:
    shape = Shape.of(decoder_directory, torch.bfloat16, bits, 64, kv_bits)
    costs = measure(shape, 16)
    columns, numbers = costs.columns, {**vars(costs), **vars(costs.disk)}
    for name in ("columns", "disk"):
        del numbers[name]
    numbers = [*numbers.values(), *(number for column in columns for number in vars(column).values())]
    assert all(isfinite(number) for number in numbers)
    assert costs.bandwidth > 0
    assert all(column.arriving >= column.held for column in costs.columns)
    assert simulate_dense(shape, costs, 10**9).tokens_per_second > 0
    assert not list(cache_directory().glob(".probe-*"))
