"""The simulator against the engine: the same bytes and hits for the same tokens; and its times, written out."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from grating_core import BudgetError, StreamedCausalLM
from grating_core.columns import reading
from grating_core.columns.allocation import allocate
from grating_core.columns.cache import Caching, ColumnCache
from grating_core.columns.companion import KINDS
from grating_core.columns.disk import Disk
from grating_core.columns.masks import Shares
from grating_core.columns.preference import USUAL
from grating_core.columns.reading import ColumnFile
from grating_core.files.places import cache_directory
from grating_core.lab.activations import Activations, record_activations
from grating_core.lab.machine import ColumnCosts, Machine
from grating_core.lab.shape import Form, Shape
from grating_core.lab.simulator import (
    WAYS,
    find_needs,
    pruned_seconds,
    read_bytes,
    simulate,
    simulate_dense,
    streaming_seconds,
)
from grating_core.models.identity import fingerprint
from tests.core.columns.conftest import TEXT

HALF = (Shares(0.5, 0.5),) * 4
MACHINE = Machine(1e9, 20_000, 10e9, latency=1e-4)


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Shape:
    """A model whose rows of columns are whole sectors."""
    directory = tmp_path_factory.mktemp("shape")
    LlamaConfig(
        architectures=["LlamaForCausalLM"], hidden_size=1024, intermediate_size=2048, num_hidden_layers=4,
        num_attention_heads=8, vocab_size=250, max_position_embeddings=64,
    ).save_pretrained(directory)  # fmt: skip
    return Shape.of(directory, torch.float32)


@pytest.fixture(scope="module")
def activations() -> Activations:
    """Channels of uneven sizes, as models have them."""
    chance = np.random.default_rng(0)

    def magnitudes(width: int) -> np.ndarray:
        sizes = chance.lognormal(sigma=1, size=(4, 1, width))
        return (sizes * np.abs(chance.normal(size=(4, 30, width)))).astype(np.float16)

    return Activations(magnitudes(1024), magnitudes(2048))


def budgets(form: Form, *steps: float) -> Iterator[int]:
    """Budgets from the smallest, 0, to one for everything, 1."""
    with pytest.raises(BudgetError) as refused:
        form.plan(1)
    smallest, everything = refused.value.smallest, refused.value.resident
    for step in steps:
        yield smallest + int(step * (everything - smallest))


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """What the engine chooses columns by, in order: for each token and layer inputs, what is likely, products."""
    seen, choose = [], ColumnCache.choose

    def choosing(cache, values, count):
        seen.append(np.abs(values))  # in the order of the table
        return choose(cache, values, count)

    monkeypatch.setattr(ColumnCache, "choose", choosing)
    return seen


def by_column(chosen: list[np.ndarray], orders: list[list[np.ndarray]], index: int) -> np.ndarray:
    """Magnitudes of inputs or products, ``[layers, tokens, columns]``, whatever their order in the tables."""
    calls = 3 * len(orders) - 1  # for a token; the last layer has no next one, of which something is likely
    found = np.empty((len(orders), len(chosen) // calls, len(orders[0][index])), dtype=np.float32)
    for layer, order in enumerate(orders):
        place = 3 * layer + (index and (1 if layer == len(orders) - 1 else 2))
        found[layer][:, order[index]] = chosen[place::calls]
    return found


@pytest.mark.parametrize(("bits", "kv_bits"), [(None, None), (8, None), (4, 8)])
@pytest.mark.parametrize("gap", [0, 1 << 14])
def test_bytes_and_hits_are_those_of_the_engine_for_the_same_tokens(
    decoder_directory: Path,
    chosen: list[np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    spill_directory: Path,
    bits: int | None,
    kv_bits: int | None,
    gap: int,
) -> None:
    monkeypatch.setattr(reading, "Disk", lambda: Disk(gap, gap))
    shape = Shape.of(decoder_directory, torch.float32, bits, 64, kv_bits)
    settings = {"dtype": "float32", "bits": bits, "kv_bits": kv_bits, "mlp_density": 0.5, "max_length": 64}
    for budget in budgets(shape.pruned, 0, 0.3, 0.7, 1):
        chosen.clear()
        model = StreamedCausalLM.from_pretrained(decoder_directory, memory_budget=budget, **settings)
        text = model.generate("w1 w2 w3", max_new_tokens=21, temperature=1.0, seed=0)
        plan = shape.pruned.plan(budget)
        assert model.plan.parts == plan.parts
        model.close()
        (path,) = (cache_directory() / "columns").glob("*.safetensors")
        with closing(ColumnFile(path, shape.columns, fingerprint(decoder_directory))) as file:
            sector = file.sector
            orders = [[file.order(number, kind) for kind in KINDS] for number in range(1, 6)]
        inputs, products = (by_column(chosen, orders, index) for index in range(2))
        how = Caching(plan.column_share, USUAL)
        needs = find_needs(
            Activations(inputs, products),
            shape.columns,
            allocate(0.5, 5),
            how,
            costs=replace(MACHINE.costs(shape), disk=Disk(gap, gap), sector=sector),
            orders=orders,
        )
        read = read_bytes(needs).sum() + 20 * plan.bytes_read()
        assert read == text.bytes_read - text.bytes_to_first
        hits, missing = (
            sum(getattr(need, name).sum() for layer in needs for need in layer) for name in ("hits", "missing")
        )
        assert hits / (hits + missing) == pytest.approx(text.hit_rate, abs=1e-12)


@pytest.mark.parametrize(("bits", "kv_bits"), [(None, None), (None, 8), (8, 8), (4, None)])
def test_dense_streaming_reads_what_the_engine_reads(
    decoder_directory: Path, bits: int | None, kv_bits: int | None
) -> None:
    shape = Shape.of(decoder_directory, torch.float32, bits, 64, kv_bits)
    settings = {"dtype": "float32", "bits": bits, "kv_bits": kv_bits, "max_length": 64}
    for budget in budgets(shape.dense, 0, 0.5, 1):
        model = StreamedCausalLM.from_pretrained(decoder_directory, memory_budget=budget, **settings)
        text = model.generate("w1 w2 w3", max_new_tokens=6)
        assert model.plan.parts == shape.dense.plan(budget).parts
        model.close()
        read = simulate_dense(shape, MACHINE.costs(shape), budget).bytes_per_token
        assert 5 * read == text.bytes_read - text.bytes_to_first


def test_with_all_in_memory_nothing_is_read(shape: Shape, activations: Activations) -> None:
    (budget,) = budgets(shape.pruned, 1)
    dense, dip, aware = simulate(activations, shape, MACHINE.costs(shape), budget=budget, shares=HALF)
    assert dense.bytes_per_token == dip.bytes_per_token == aware.bytes_per_token == 0
    assert (dense.hit_rate, dip.hit_rate, aware.hit_rate) == (None, 1.0, 1.0)
    head, layers = 4 * 250 * 1024, 4 * max(shape.dense.sizes.layers)
    assert dense.tokens_per_second == pytest.approx(10e9 / (head + layers))
    used = 4 * max(shape.pruned.sizes.layers) + shape.columns.depth * shape.columns.layer_bytes / 2
    # All of several equal values are used, if one of them is.
    assert dip.tokens_per_second == aware.tokens_per_second == pytest.approx(10e9 / (head + used), rel=1e-3)


def test_more_memory_never_reads_more_and_is_never_slower(shape: Shape, activations: Activations) -> None:
    costs = MACHINE.costs(shape)
    found = [
        simulate(activations, shape, costs, budget=budget, shares=HALF)
        for budget in budgets(shape.pruned, 0, 0.1, 0.3, 0.5, 0.7, 0.9, 1)
    ]
    for way in range(len(WAYS)):
        read = [estimates[way].bytes_per_token for estimates in found]
        assert all(less >= more for less, more in pairwise(read))
        assert read[0] > read[-1] == 0
        speeds = [estimates[way].tokens_per_second for estimates in found]
        assert all(slow <= fast * 1.005 for slow, fast in pairwise(speeds))


def test_a_preference_reads_less_and_is_faster(shape: Shape, activations: Activations) -> None:
    (budget,) = budgets(shape.pruned, 0.5)
    _, dip, aware = simulate(activations, shape, MACHINE.costs(shape), budget=budget, shares=HALF)
    assert aware.hit_rate > dip.hit_rate + 0.05
    assert aware.bytes_per_token < dip.bytes_per_token
    assert aware.tokens_per_second > dip.tokens_per_second


@pytest.mark.parametrize("step", [0, 0.5])
def test_the_time_of_a_token_is_the_sum_of_its_parts(shape: Shape, activations: Activations, step: float) -> None:
    costs = replace(
        MACHINE.costs(shape),
        columns=(ColumnCosts(3e-6, 5e-6, 1e-4), ColumnCosts(1e-6, 2e-6, 3e-4)),
        pruned=2e-3,
        pruned_streamed=3e-3,
        outside_pruned=5e-3,
    )
    (budget,) = budgets(shape.pruned, step)
    plan = shape.pruned.plan(budget)
    how = Caching(plan.column_share, USUAL)
    without_gaps = replace(costs, disk=Disk(0, 0))
    needs = find_needs(activations, shape.columns, HALF, how, costs=without_gaps)
    assert (len(plan.streamed) > 0) == (step == 0)
    token, now, disk = 7, 0.0, 0.0
    for number, layer in enumerate(needs, 1):
        now += 3e-3 if number in plan.streamed else 2e-3
        for need, cost in zip(layer, costs.columns, strict=True):
            reads, read, blocks = int(need.reads[token]), int(need.bytes[token]), int(need.blocks[token])
            assert 0 < reads <= need.missing[token]
            ahead = int(need.bytes_ahead[token])
            assert (ahead > 0) == (need is layer[0] and number > 1)
            assert read + ahead >= need.missing[token] * (16384 if need is layer[0] else 4096)
            disk = max(disk, now) + costs.latency + reads * costs.each + read * costs.byte
            arriving = need.missing[token] * cost.arriving
            now = max(now + need.hits[token] * cost.held + arriving * (1 - 1 / blocks), disk)
            now += arriving / blocks + cost.starting
            if number < len(needs):
                own = needs[number][0]
                reading = costs.latency + own.reads_ahead[token] * costs.each + own.bytes_ahead[token] * costs.byte
                disk += reading / 2
    seconds = now + 5e-3
    assert pruned_seconds(plan, costs, needs)[token] == pytest.approx(seconds)


@pytest.mark.parametrize("bandwidth", [0.2e9, 50e9])
def test_streaming_overlaps_reading_with_computing(shape: Shape, bandwidth: float) -> None:
    costs = replace(MACHINE.costs(shape), bandwidth=bandwidth, streamed=4e-3, layer=2e-3, outside=5e-3)
    for budget in budgets(shape.dense, 0, 0.5):
        plan = shape.dense.plan(budget)
        streamed = len(plan.streamed)
        assert streamed > 1
        computing = streamed * 4e-3 + (4 - streamed) * 2e-3 + 5e-3
        slower = max(plan.bytes_read() / bandwidth, computing)
        assert streaming_seconds(plan, costs) == pytest.approx(slower)


def test_a_single_streamed_layer_is_not_read_while_it_computes(shape: Shape) -> None:
    plan = replace(shape.dense.plan(10**10), resident=(1, 3, 4))
    costs = replace(MACHINE.costs(shape), bandwidth=0.2e9, streamed=4e-3, layer=2e-3, outside=5e-3)
    expected = 4e-3 + max(plan.bytes_read() / 0.2e9, 3 * 2e-3 + 5e-3)
    assert streaming_seconds(plan, costs) == pytest.approx(expected)


def test_recorded_activations_run_at_another_shape(decoder_directory: Path, shape: Shape, tmp_path: Path) -> None:
    activations = record_activations(decoder_directory, TEXT, 20, path=tmp_path / "activations.safetensors")
    (budget,) = budgets(shape.pruned, 0.5)
    _, dip, aware = simulate(activations, shape, MACHINE.costs(shape), budget=budget, shares=HALF)
    assert 0 < dip.hit_rate < aware.hit_rate < 1


def test_bad_input_is_refused(shape: Shape, activations: Activations) -> None:
    with pytest.raises(BudgetError, match="memory_budget=1,000 bytes is too small"):
        simulate(activations, shape, MACHINE.costs(shape), budget=1000, shares=HALF)
    with pytest.raises(ValueError, match="3 shares for 4 layers"):
        simulate(activations, shape, MACHINE.costs(shape), budget=10**9, shares=HALF[:3])
