"""A model in 8 bits beside the same model without: agreement, kept products, margins, and what auto takes."""

import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from grating_core.errors import BudgetError, FileError
from grating_core.kernels.choice import kernels
from grating_core.lens.observations import observe_all
from grating_core.lens.quantized import agrees, quantize
from grating_core.lens.store import CalibratedLens, lens_directory
from grating_core.models.cross_encoder import Shape
from grating_core.models.packing import KINDS, QUANTIZED
from grating_core.models.placement import choose_dtype
from grating_core.pruning.conformal import Requests, replay_pruning
from grating_core.requests import Request
from tests.core.conftest import WORDS, save_model
from tests.core.parity import load, random_text

SOURCE = random.Random(11)
TEXTS = [random_text(SOURCE.randint(5, 40), SOURCE, WORDS) for _ in range(60)]
QUESTIONS = [random_text(4, SOURCE, WORDS) for _ in range(40)]
compiled = pytest.mark.skipif(not kernels().has(torch.int8), reason=f"no kernels for 8 bits: {kernels().reason}")


class Noisy:
    """A model whose scores are off by what each kind of products in 8 bits costs."""

    def __init__(self, costs: dict[str, float]) -> None:
        self.costs = costs
        self.opened: list[tuple[str, ...]] = []

    @contextmanager
    def __call__(self, kept: Sequence[str] | None) -> Iterator[object]:
        self.opened.append(tuple(kept or ()))
        noise = 0.0 if kept is None else sum(cost for kind, cost in self.costs.items() if kind not in kept)

        def observe(request: Request, observer: object) -> tuple[np.ndarray, np.ndarray]:
            for parts in observer.features:
                parts.append(torch.zeros(len(request.documents), 1))
            seed = sum(map(ord, request.query))
            scores = np.random.default_rng(seed).normal(size=len(request.documents))
            wrong = np.random.default_rng(seed + 1).normal(size=len(request.documents))
            return (scores + noise * wrong).astype(np.float32), np.ones(len(request.documents), dtype=np.int64)

        yield observe


def quantized(costs: dict[str, float]) -> tuple[Noisy, object]:
    model = Noisy(costs)
    requests = [[Request(f"query {number}", [str(n) for n in range(20)]) for number in range(60)]]
    shape = Shape(2, 4, "first")
    with model(None) as observe:
        full = [observe_all(observe, requests[0], shape)]
    return model, quantize(model, requests, full, shape)


def test_nothing_is_kept_of_a_model_that_agrees(spill_directory: Path) -> None:
    noisy, found = quantized(dict.fromkeys(KINDS, 0.0005))
    assert found.kept == ()
    assert agrees(found.agreement)
    assert sorted(found.agreement) == [1, 5, 10]
    assert noisy.opened == [(), ()]


def test_what_costs_most_is_kept_first(spill_directory: Path) -> None:
    _, found = quantized({"attention": 0.0, "output": 0.2, "inner": 0.0, "down": 0.6})
    assert found.kept == ("down", "output")
    assert found.agreement == {1: 1.0, 5: 1.0, 10: 1.0}


def test_the_promise_counts_both_losses() -> None:
    chance = np.random.default_rng(0)
    full = chance.normal(size=(50, 20))
    rounded = full + 0.3 * chance.normal(size=full.shape)
    requests = Requests(rounded[:, :, None], rounded, np.ones(full.shape, dtype=np.int64), full)
    top = [set(row.argsort()[-5:]) for row in full]
    found = [set(row.argsort()[-5:]) for row in rounded]
    expected = [len(one - other) / 5 for one, other in zip(top, found, strict=True)]
    assert sum(expected) > 0
    for some in (requests, requests.first(20)):
        # Nothing is dropped, so that what is lost is what 8 bits lose.
        assert replay_pruning(some, 5, drop=np.array([np.inf]), select=None).lost == pytest.approx(expected)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in the dtype that auto takes without 8 bits, so that a budget needs no room to convert it."""
    directory = save_model(tmp_path_factory.mktemp("model"), "bert")
    weights, (dtype, _) = directory / "model.safetensors", choose_dtype("auto", torch.device("cpu"))
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def calibrated(model: Path, tmp_path_factory: pytest.TempPathFactory) -> CalibratedLens:
    """The lens of the tiny model, calibrated without 8 bits and with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRATING_CACHE", str(tmp_path_factory.mktemp("cache")))
        with load(model, pruning="auto") as reranker:
            made = reranker.calibrate(TEXTS, QUESTIONS, candidates=10, top_k=3, requests=40)
            used = reranker.lens
        kept = CalibratedLens.load(lens_directory(reranker.identity))
    check_calibrated(made, kept)
    assert used is not None
    assert used.margins is made.margins
    return made


def check_calibrated(made: CalibratedLens, kept: CalibratedLens) -> None:
    assert made.int8 is not None
    assert kept.int8 is not None
    assert (kept.int8.kept, kept.int8.agreement) == (made.int8.kept, made.int8.agreement)
    assert sorted(made.int8.agreement) == [1, 5]
    assert np.array_equal(kept.int8.margins.bounds, made.int8.margins.bounds)


def put(lens: CalibratedLens, **int8: object) -> None:
    """Put a lens into the cache, with other findings of 8 bits."""
    assert lens.int8 is not None
    replace(lens, int8=replace(lens.int8, **int8)).save(lens_directory(lens.fingerprint))


@compiled
def test_margins_for_other_products_do_not_prune_8_bits(
    model: Path, calibrated: CalibratedLens, spill_directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    replace(calibrated, int8=None).save(lens_directory(calibrated.fingerprint))
    with load(model, pruning="auto", target=0.5) as reranker:
        assert reranker.rerank("w1 w2", TEXTS, 3).trace.compute_share < 1
    with load(model, pruning="auto", target=0.5, dtype="int8") as reranker:
        assert reranker.rerank("w1 w2", TEXTS, 3).trace.compute_share == 1
        assert "has no lens with margins for 8 bits: fit one" in caplog.text
        made = reranker.calibrate(TEXTS, QUESTIONS, candidates=10, top_k=3, requests=25)
        check_calibrated(made, CalibratedLens.load(lens_directory(reranker.identity)))
        assert reranker.lens is not None
        assert reranker.lens.margins is made.int8.margins


@compiled
def test_auto_takes_8_bits_where_they_agree(
    model: Path, calibrated: CalibratedLens, spill_directory: Path
) -> None:
    for share, kept, expected in ((0.99, (), torch.int8), (0.99, ("down",), torch.int8), (0.98, (), None)):
        put(calibrated, kept=kept, agreement={1: 1.0, 5: share})
        with load(model, pruning="auto", dtype="auto") as reranker:
            assert (reranker.dtype == torch.int8) == (expected == torch.int8)
            if expected is not None:
                packing = reranker.scorer.model.packing
                assert packing is not None
                assert packing.quantized == QUANTIZED.difference(kept)
                assert np.array_equal(reranker.lens.margins.bounds, calibrated.int8.margins.bounds)
        with load(model, pruning="off", dtype="int8") as reranker:  # who asks for 8 bits gets them
            assert reranker.dtype == torch.int8
    replace(calibrated, int8=None).save(lens_directory(calibrated.fingerprint))
    with load(model, pruning="auto", dtype="auto") as reranker:
        assert reranker.dtype != torch.int8


@compiled
def test_auto_does_without_8_bits_where_they_cannot_be_stored(
    model: Path, calibrated: CalibratedLens, spill_directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(calibrated, kept=(), agreement={1: 1.0, 5: 1.0})
    auto: dict[str, object] = {"pruning": "auto", "dtype": "auto"}
    with pytest.raises(BudgetError) as told:
        load(model, **auto, memory_budget=1)
    budget = told.value.smallest
    (spill_directory / "layers").write_text("a file where a directory should be")
    with pytest.raises(BudgetError) as told:  # without 8 bits it takes more
        load(model, **auto, memory_budget=budget)
    assert told.value.smallest > budget
    (line,) = caplog.messages
    assert re.search(r"dtype='auto' takes b?float\d\d and not 8 bits: .*layers.* cannot be written", line)
    with load(model, **auto, memory_budget="1GB") as reranker:
        assert reranker.dtype == torch.int8  # everything is in memory, so that nothing is stored
    (spill_directory / "layers").unlink()
    with load(model, **auto, memory_budget=budget) as reranker:
        assert reranker.dtype == torch.int8


@compiled
def test_damaged_figures_are_refused(calibrated: CalibratedLens, spill_directory: Path) -> None:
    directory = lens_directory(calibrated.fingerprint)
    for wrong in ({"kept": ("middle",)}, {"agreement": {5: 1.5}}, {"agreement": {5: float("nan")}}):
        put(calibrated, **wrong)
        with pytest.raises(FileError, match=r"cannot be read.*int8 has"):
            CalibratedLens.load(directory)
