"""A model in 8 bits beside the same model without: agreement, recounts, margins, and what auto takes."""

import random
import re
from collections.abc import Iterator
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
from grating_core.lens.quantized import Quantized, agrees, quantize
from grating_core.lens.store import CalibratedLens, lens_directory
from grating_core.models.cross_encoder import Shape
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
    """A model whose scores in 8 bits are off by some normal noise."""

    def __init__(self, noise: float) -> None:
        self.noise = noise
        self.opened: list[bool] = []

    @contextmanager
    def __call__(self, in_8_bits: bool) -> Iterator[object]:
        self.opened.append(in_8_bits)

        def observe(request: Request, observer: object) -> tuple[np.ndarray, np.ndarray]:
            for parts in observer.features:
                parts.append(torch.zeros(len(request.documents), 1))
            seed = sum(map(ord, request.query))
            scores = np.random.default_rng(seed).normal(size=len(request.documents))
            wrong = np.random.default_rng(seed + 1).normal(size=len(request.documents))
            return (scores + in_8_bits * self.noise * wrong).astype(np.float32), np.ones(20, dtype=np.int64)

        yield observe


def quantized(noise: float) -> Quantized:
    model = Noisy(noise)
    requests = [[Request(f"query {number}", [str(n) for n in range(20)]) for number in range(60)]]
    shape = Shape(2, 4, "first")
    with model(False) as observe:
        full = [observe_all(observe, requests[0], shape)]
    found = quantize(model, requests, full, shape)
    assert model.opened == [False, True]
    assert sorted(found.agreement) == sorted(found.recounted) == [1, 5, 10]
    return found


def test_a_model_that_agrees_has_little_doubt(spill_directory: Path) -> None:
    found = quantized(0.0005)
    assert agrees(found.agreement)
    assert found.doubt < 0.0005


def test_recounts_make_up_for_noise(spill_directory: Path) -> None:
    found = quantized(0.05)
    assert found.agreement[5] < 0.97
    assert found.recounted[5] >= 0.995
    assert 0.02 < found.doubt < 0.2


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
    recounted = replay_pruning(replace(requests, doubt=5.0), 5, drop=np.array([np.inf]), select=None)
    assert not recounted.lost.any()
    assert recounted.compute_share == pytest.approx(2.0)  # all are computed twice
    some_again = replay_pruning(replace(requests, doubt=0.2), 5, drop=np.array([np.inf]), select=None)
    assert 0 < some_again.lost.mean() < sum(expected) / 50
    assert 1 < some_again.compute_share.mean() < 1.5


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
    assert kept.int8.agreement == made.int8.agreement
    assert (kept.int8.recounts.doubt, kept.int8.recounts.agreement) == (
        made.int8.recounts.doubt,
        made.int8.recounts.agreement,
    )
    assert sorted(made.int8.agreement) == sorted(made.int8.recounts.agreement) == [1, 5]
    assert np.array_equal(kept.int8.margins.bounds, made.int8.margins.bounds)
    assert np.array_equal(kept.int8.recounts.margins.bounds, made.int8.recounts.margins.bounds)


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
    recounts = calibrated.int8.recounts
    for alone, recounted in ((0.9, 0.99), (0.9, 0.98), (0.99, 0.99)):
        put(
            calibrated,
            agreement={1: 1.0, 5: alone},
            recounts=replace(recounts, agreement={1: 1.0, 5: recounted}),
        )
        with load(model, pruning="auto", dtype="auto") as reranker:
            assert (reranker.dtype == torch.int8) == (recounted == 0.99)
            if recounted == 0.99:
                assert np.array_equal(reranker.lens.margins.bounds, recounts.margins.bounds)
        # Within a budget nothing is recounted.
        with load(model, pruning="auto", dtype="auto", memory_budget="1GB") as reranker:
            assert (reranker.dtype == torch.int8) == (alone == 0.99)
            if alone == 0.99:
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
    put(calibrated, agreement={1: 1.0, 5: 1.0})
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
    recounts = calibrated.int8.recounts
    for wrong in (
        {"recounts": replace(recounts, doubt=-1.0)},
        {"recounts": replace(recounts, agreement={5: -0.5})},
        {"agreement": {5: 1.5}},
        {"agreement": {5: float("nan")}},
    ):
        put(calibrated, **wrong)
        with pytest.raises(FileError, match=r"cannot be read.*int8 has"):
            CalibratedLens.load(directory)
