"""A model in 8 bits beside the same model without: agreement, kept products, margins, and what auto takes."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from grating_core.errors import FileError
from grating_core.kernels.choice import kernels
from grating_core.lens.observations import observe_all
from grating_core.lens.quantized import agrees, quantize
from grating_core.lens.store import CalibratedLens, lens_directory
from grating_core.models.cross_encoder import Shape
from grating_core.models.packing import KINDS, QUANTIZED
from grating_core.pruning.conformal import Requests, replay_pruning
from grating_core.requests import Request
from tests.core.conftest import WORDS
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
    model, found = quantized(dict.fromkeys(KINDS, 0.0005))
    assert found.kept == ()
    assert agrees(found.agreement)
    assert sorted(found.agreement) == [1, 5, 10]
    assert model.opened == [(), ()]


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


@compiled
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_calibration_looks_at_8_bits(tiny_bert: Path, dtype: str, spill_directory: Path) -> None:
    with load(tiny_bert, pruning="auto", dtype=dtype) as reranker:
        made = reranker.calibrate(TEXTS, QUESTIONS, candidates=10, top_k=3, requests=40)
        kept = CalibratedLens.load(lens_directory(reranker.identity))
        used = reranker.lens
    assert made.int8 is not None
    assert kept.int8 is not None
    assert (kept.int8.kept, kept.int8.agreement) == (made.int8.kept, made.int8.agreement)
    assert sorted(made.int8.agreement) == [1, 5]
    assert np.array_equal(kept.int8.margins.bounds, made.int8.margins.bounds)
    assert used is not None
    assert used.margins is (made.int8.margins if dtype == "int8" else made.margins)


@compiled
def test_auto_takes_8_bits_where_they_agree(tiny_bert: Path, spill_directory: Path) -> None:
    with load(tiny_bert, pruning="auto") as reranker:
        made = reranker.calibrate(TEXTS, QUESTIONS, candidates=10, top_k=3, requests=25)
    assert made.int8 is not None
    for share, kept, expected in ((0.99, (), torch.int8), (0.99, ("down",), torch.int8), (0.98, (), None)):
        int8 = replace(made.int8, kept=kept, agreement={1: 1.0, 5: share})
        replace(made, int8=int8).save(lens_directory(made.fingerprint))
        with load(tiny_bert, pruning="auto", dtype="auto") as reranker:
            assert (reranker.dtype == torch.int8) == (expected == torch.int8)
            if expected is not None:
                packing = reranker.scorer.model.packing
                assert packing is not None
                assert packing.quantized == QUANTIZED.difference(kept)
                assert np.array_equal(reranker.lens.margins.bounds, int8.margins.bounds)
        with load(tiny_bert, pruning="off", dtype="int8") as reranker:  # who asks for 8 bits gets them
            assert reranker.dtype == torch.int8
    replace(made, int8=None).save(lens_directory(made.fingerprint))
    with load(tiny_bert, pruning="auto", dtype="auto") as reranker:
        assert reranker.dtype != torch.int8


def test_damaged_figures_are_refused(tiny_bert: Path, tmp_path: Path, spill_directory: Path) -> None:
    with load(tiny_bert, pruning="auto") as reranker:
        made = reranker.calibrate(TEXTS, QUESTIONS, candidates=10, top_k=3, requests=25)
    if made.int8 is None:
        pytest.skip("nothing was measured in 8 bits")
    for wrong in ({"kept": ("middle",)}, {"agreement": {5: 1.5}}, {"agreement": {5: float("nan")}}):
        replace(made, int8=replace(made.int8, **wrong)).save(tmp_path / "lens")
        with pytest.raises(FileError, match=r"cannot be read.*int8 has"):
            CalibratedLens.load(tmp_path / "lens")
