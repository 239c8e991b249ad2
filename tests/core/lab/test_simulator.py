"""The simulator's limits, its caches against the cache itself, and its times against sums written out."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from grating_core import ModelNotFoundError, UnsupportedModelError
from grating_core.columns.allocation import divide_room
from grating_core.columns.cache import Caching, ColumnCache, Preference
from grating_core.columns.companion import ColumnSizes
from grating_core.columns.masks import Shares
from grating_core.lab.activations import Activations, record_activations
from grating_core.lab.machine import MACHINES, Costs, Machine, describe_machine, probe
from grating_core.lab.simulator import (
    WAYS,
    Shape,
    count_traffic,
    find_needs,
    pruned_seconds,
    read_bytes,
    simulate,
    streaming_seconds,
)
from tests.core.columns.conftest import TEXT
from tests.core.conftest import save_model

# Widths at which a row of either kind is a whole number of sectors, so that nothing is read but weights.
SIZES = ColumnSizes(4, 1024, 2048, torch.float32)
SHAPE = Shape(SIZES, attention=4_000_000, outside=1_000_000, head=900_000)
HALF = (Shares(0.5, 0.5),) * 4
MACHINE = describe_machine(1e9, 20_000, 10e9, latency=1e-4)
FAST_DISK = describe_machine(1e18, 1e18, 10e9)


@pytest.fixture(scope="module")
def activations() -> Activations:
    """Channels of uneven sizes, as models have them."""
    chance = np.random.default_rng(0)

    def magnitudes(width: int) -> np.ndarray:
        sizes = chance.lognormal(sigma=1, size=(4, 1, width))
        return (sizes * np.abs(chance.normal(size=(4, 30, width)))).astype(np.float16)

    return Activations(magnitudes(1024), magnitudes(2048))


def test_with_all_in_memory_nothing_is_read(activations: Activations) -> None:
    for estimate in simulate(activations, SHAPE, MACHINE, memory=SHAPE.total, shares=HALF):
        assert estimate.bytes_per_token == 0
        assert estimate.hit_rate in (None, 1.0)
    dense, dip, aware = simulate(activations, SHAPE, MACHINE, memory=SHAPE.total, shares=HALF)
    assert dense.tokens_per_second == pytest.approx(10e9 / (SHAPE.total - SHAPE.outside + SHAPE.head))
    used = 4 * (SHAPE.attention + SIZES.layer_bytes / 2) + SHAPE.head
    assert dip.tokens_per_second == aware.tokens_per_second == pytest.approx(10e9 / used)


def test_with_an_infinitely_fast_disk_only_computing_counts(activations: Activations) -> None:
    for memory in (SHAPE.memory(0), SHAPE.memory(0.5)):
        dense, *pruned = simulate(activations, SHAPE, FAST_DISK, memory=memory, shares=HALF)
        assert dense.tokens_per_second == pytest.approx(10e9 / (4 * SHAPE.layer + SHAPE.head))
        for way in pruned:
            # What is read is copied once more, which takes reading and writing it.
            moved = 4 * (SHAPE.attention + SIZES.layer_bytes / 2) + SHAPE.head + 2 * way.bytes_per_token
            assert way.tokens_per_second == pytest.approx(10e9 / moved, rel=0.01)


def test_more_memory_never_reads_more(activations: Activations) -> None:
    found = [
        simulate(activations, SHAPE, MACHINE, memory=SHAPE.memory(share), shares=HALF)
        for share in (0, 0.1, 0.3, 0.5, 0.7, 0.9, 1)
    ]
    for way in range(len(WAYS)):
        read = [estimates[way].bytes_per_token for estimates in found]
        assert all(less >= more for less, more in pairwise(read))
        assert read[0] > read[-1] == 0
        speeds = [estimates[way].tokens_per_second for estimates in found]
        assert all(slow <= fast * 1.001 for slow, fast in pairwise(speeds))


def test_at_density_1_pruning_reads_the_mlps_that_dense_reads(activations: Activations) -> None:
    dense, dip, aware = simulate(activations, SHAPE, MACHINE, memory=SHAPE.memory(0), shares=(Shares(1, 1),) * 4)
    # So much memory holds the attention of all layers for DIP; for dense streaming no whole layer.
    assert dense.bytes_per_token == 4 * SHAPE.layer
    assert dip.bytes_per_token == aware.bytes_per_token == 4 * SIZES.layer_bytes


def test_hits_and_reads_are_those_of_the_cache_token_by_token(activations: Activations) -> None:
    needs = find_needs(activations, SIZES, HALF, Caching(0.4, Preference(0.3, 0.3)), gap=-1)
    for layer in (0, 3):
        cache = ColumnCache(2048, int(divide_room(0.4, HALF[0]).products * 2048), preference=0.3)
        cache.fill()
        need = needs[layer][1]
        for token, row in enumerate(activations.products[layer].astype(np.float32)):
            choice = cache.choose(row, 1024)
            assert need.hits[token] == choice.hits
            missing = set(choice.columns[choice.hits :].tolist())
            assert need.missing[token] == len(missing)
            assert need.reads[token].tolist() == [4096] * len(missing)  # without gaps, each column is a read
    traffic = count_traffic(needs, SIZES)
    assert traffic.hit_rate() == pytest.approx(traffic.hits.sum() / (30 * 4 * (512 + 1024)))
    missing = sum(need.missing.sum() * SIZES.row_bytes(need.kind) for layer in needs for need in layer)
    assert traffic.bytes_per_token * 30 == read_bytes(needs) * 30 == missing
    wide = find_needs(activations, SIZES, HALF, Caching(0.4, Preference(0.3, 0.3)), gap=3 * 4096)
    assert read_bytes(wide) > read_bytes(needs)
    for layer, others in zip(needs, wide, strict=True):
        for need, other in zip(layer, others, strict=True):
            assert need.missing.tolist() == other.missing.tolist()
            assert sum(map(len, other.reads)) < sum(map(len, need.reads))


def test_a_preference_reads_less_and_is_faster(activations: Activations) -> None:
    _, dip, aware = simulate(activations, SHAPE, MACHINE, memory=SHAPE.memory(0.5), shares=HALF)
    assert aware.hit_rate > dip.hit_rate + 0.05
    assert aware.bytes_per_token < dip.bytes_per_token
    assert aware.tokens_per_second > dip.tokens_per_second


def test_the_time_of_a_token_is_the_sum_of_its_parts(activations: Activations) -> None:
    machine = replace(
        MACHINE, choosing=Costs(((1, 3e-5),)), layer=2e-4, column=Costs(((4096, 1e-6), (16384, 3e-6)))
    )
    # Rows of 16,384 and of 4,096 bytes.
    needs = find_needs(activations, SIZES, HALF, Caching(0.4, Preference(0.3, 0.3)), gap=-1)
    token, seconds = 7, SHAPE.head / 10e9
    for layer in needs:
        seconds += 2e-4 + SHAPE.attention / 10e9
        for need, row, column in zip(layer, (16384, 4096), (3e-6, 1e-6), strict=True):
            choosing = 3e-5 * SIZES.count(need.kind)
            reading = sum(float(machine.read(int(size))) for size in need.reads[token])
            computing = need.hits[token] * column
            seconds += choosing + max(computing, reading) + need.missing[token] * (column + 2 * row / 10e9)
    assert pruned_seconds(SHAPE, machine, needs)[token] == pytest.approx(seconds)


@pytest.mark.parametrize(("disk", "bound"), [(0.2e9, "reading"), (50e9, "computing")])
def test_streaming_overlaps_reading_with_computing(disk: float, bound: str) -> None:
    machine = describe_machine(disk, 1e4, 10e9)
    for resident in (0, 2):
        reading = (4 - resident) * SHAPE.layer / disk
        computing = (4 * SHAPE.layer + SHAPE.head) / 10e9
        expected = {"reading": reading, "computing": computing}[bound]
        assert streaming_seconds(SHAPE, machine, resident) == pytest.approx(expected)


def test_costs_between_and_beyond_what_is_known() -> None:
    costs = Costs(((10, 1.0), (20, 3.0)))
    np.testing.assert_allclose(costs([1, 10, 15, 20, 40]), [1, 1, 2, 3, 6])
    assert describe_machine(1e9, 1e4, 1e9).reading(np.array([], dtype=np.int64)) == 0
    assert describe_machine(1e9, 1e4, 1e9, latency=1.0).reading(np.array([4096])) == 1.0
    for machine in MACHINES.values():
        assert float(machine.read(100_000_000)) == pytest.approx(100_000_000 / machine.disk_bandwidth)


def test_a_shape_is_that_of_the_model(decoder_directory: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(decoder_directory)
    shape = Shape.of(decoder_directory, torch.bfloat16)
    assert shape.columns == ColumnSizes(5, 32, 48, torch.bfloat16)
    assert shape.total == 2 * model.num_parameters()
    assert shape.head == 2 * 32 * 210
    config = Qwen3Config(
        architectures=["Qwen3ForCausalLM"], hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=151_936, tie_word_embeddings=True,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    shape = Shape.of(tmp_path, torch.bfloat16)
    assert shape.total == 2 * 4_022_468_096  # of Qwen3-4B, embeddings once
    assert shape.share(shape.memory(0.5)) == pytest.approx(0.5)
    assert shape.resident(shape.total) == 36


def test_recorded_activations_run_at_another_shape(decoder_directory: Path, tmp_path: Path) -> None:
    activations = record_activations(decoder_directory, TEXT, 20, path=tmp_path / "activations.safetensors")
    _, dip, aware = simulate(activations, SHAPE, MACHINE, memory=SHAPE.memory(0.5), shares=HALF)
    assert 0 < dip.hit_rate < aware.hit_rate < 1


def test_bad_input_is_refused(activations: Activations, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"memory=1,000 is too small.* 17,000,000 "):
        simulate(activations, SHAPE, MACHINE, memory=1000, shares=HALF)
    with pytest.raises(ValueError, match="3 shares for 4 layers"):
        simulate(activations, SHAPE, MACHINE, memory=SHAPE.total, shares=HALF[:3])
    with pytest.raises(ValueError, match="disk_reads=0"):
        describe_machine(1e9, 0, 1e9)
    with pytest.raises(UnsupportedModelError):
        Shape.of(save_model(tmp_path / "bert", "bert"), torch.float32)
    with pytest.raises(ModelNotFoundError):
        Shape.of(tmp_path / "nowhere", torch.float32)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": "wide"}))
    with pytest.raises(ModelNotFoundError):
        Shape.of(tmp_path, torch.float32)


@pytest.mark.slow
def test_this_machine_can_be_measured(tmp_path: Path) -> None:
    machine = probe(tmp_path, torch.float32)
    assert isinstance(machine, Machine)
    assert machine.disk_bandwidth > 1e7
    assert 1e8 < machine.memory_bandwidth < 1e12
    assert 0 < machine.latency < 0.1
    assert all(
        seconds > 0 for costs in (machine.read, machine.column, machine.choosing) for _, seconds in costs.points
    )
    assert not list(tmp_path.iterdir())
