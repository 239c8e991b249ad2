"""Machines that are described by a few numbers."""

from pathlib import Path

import pytest
import torch

from grating_core.lab.machine import MACHINES, Machine, find_machine, parse_rate
from grating_core.lab.shape import Shape


def test_a_machine_takes_time_only_for_its_disk_and_to_read_memory(decoder_directory: Path) -> None:
    shape = Shape.of(decoder_directory, torch.float32)
    costs = Machine(1e9, 20_000, 10e9, latency=1e-4).costs(shape)
    assert costs.each + 4096 * costs.byte == pytest.approx(1 / 20_000)
    assert costs.byte == 1 / costs.bandwidth == 1e-9
    assert costs.disk.inputs == 8 * 4096  # the power of two that is nearest to 50,000 bytes less a sector
    faster = Machine(1e9, 60_000, 10e9).costs(shape)
    assert faster.disk.products == 4 * 4096  # in the time of a read the disk gives 16,666 bytes
    assert costs.outside == 4 * 210 * 32 / 10e9
    assert costs.columns[0].held == 4 * 2 * 48 / 10e9
    assert costs.columns[0].arriving == costs.columns[0].held
    reading = max(shape.pruned.sizes.bytes_read) / 1e9
    assert costs.pruned_streamed - costs.pruned == pytest.approx(reading)


def test_no_disk_is_faster_at_small_reads_than_at_long_ones(decoder_directory: Path) -> None:
    shape = Shape.of(decoder_directory, torch.float32)
    assert Machine(1e9, 1e9, 10e9).costs(shape).each == 0
    assert all(machine.costs(shape).each >= 0 for machine in MACHINES.values())


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="disk_reads=0"):
        Machine(1e9, 0, 1e9)
    with pytest.raises(ValueError, match="machine='toaster' is unknown"):
        find_machine("toaster")
    with pytest.raises(ValueError, match="disk_bandwidth='fast'"):
        parse_rate("fast", "disk_bandwidth")
    assert parse_rate("500MB/s", "disk_bandwidth") == 500e6
