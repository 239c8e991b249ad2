"""Layers in 8 bits: packed when they are read, or streamed from a companion file."""

import random
import shutil
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from grating_core import Reranker, StreamedCausalLM
from grating_core.errors import FileError, StorageError
from grating_core.files.locks import locked
from grating_core.kernels.choice import kernels
from grating_core.layers.packed import INT8 as BY_COLUMN
from grating_core.layers.packed import Q4, Format, tensors_of
from grating_core.memory.checkpoint import SECTOR
from grating_core.memory.header import parse_header
from grating_core.models.cross_encoder import StoredCrossEncoder
from grating_core.models.packing import IN_8_BITS, Packing
from tests.core.conftest import BUNDLED, WINDOW, WORDS, save_model
from tests.core.memory.conftest import PLANS, load_planned
from tests.core.parity import load, random_text

CPU = torch.device("cpu")
INT8 = Packing(torch.float32, IN_8_BITS)
SOURCE = random.Random(18)
PAIRS = [("w1 w2", random_text(length, SOURCE, WORDS)) for length in (0, 1, 2 * WINDOW, 7, 30, 31, 64, 90)]


def companion(cache: Path) -> Path:
    (path,) = (cache / "layers").glob("*.safetensors")
    return path


@pytest.mark.parametrize(
    "formats", [{}, IN_8_BITS, {"query": BY_COLUMN, "down": Format(4, grouped=True), "up": Q4}]
)
def test_a_layout_is_that_of_what_is_packed(tiny: Path, formats: dict[str, Format]) -> None:
    stored = StoredCrossEncoder(tiny, device=CPU, dtype=torch.bfloat16)
    packing = Packing(torch.bfloat16, formats)
    packed = stored.load(None, packing=packing)
    for number, spec in enumerate(stored.spec.layers, 1):
        with packed.layer(number) as layer:
            tensors = tensors_of(layer.weights)
            wanted = packing.layout(stored.family, spec)
            assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == wanted


def test_every_family_scores_nearly_as_in_float32(tiny: Path) -> None:
    expected = torch.tensor(load(tiny).score(PAIRS))
    found = torch.tensor(load(tiny, dtype="int8").score(PAIRS))
    # The tiny models have large random weights, which rounding to 8 bits changes more than a trained model's.
    assert (found - expected).abs().mean() < 0.15 * (expected.max() - expected.min())
    assert torch.corrcoef(torch.stack((found, expected)))[0, 1] > 0.9


@cache
def whole_scores(directory: Path) -> list[float]:
    return load_planned(directory, packing=INT8).score(PAIRS)


@pytest.mark.parametrize("plan", PLANS)
def test_streamed_layers_give_the_same_bits(tiny: Path, plan: str, spill_directory: Path) -> None:
    assert load_planned(tiny, packing=INT8, **PLANS[plan]).score(PAIRS) == whole_scores(tiny)


def test_the_real_model_ranks_as_in_float32(bundled: Reranker) -> None:
    documents = [f"Berlin has {n} million inhabitants. " * (n % 40 + 1) for n in range(30)]
    expected = bundled.rerank("How many people live in Berlin?", documents, 30)
    with Reranker.from_pretrained(BUNDLED, dtype="int8", device="cpu", pruning="off") as reranker:
        found = reranker.rerank("How many people live in Berlin?", documents, 30)
        assert reranker.dtype == torch.int8
    best = [{ranked.index for ranked in result.ranking[:5]} for result in (expected, found)]
    assert len(best[0] & best[1]) >= 4
    scores = {ranked.index: ranked.score for ranked in expected.ranking}
    assert all(abs(ranked.score - scores[ranked.index]) < 0.35 for ranked in found.ranking)


def test_a_budget_is_kept_and_half_is_read(spill_directory: Path) -> None:
    with pytest.raises(ValueError, match="memory_budget") as less:
        Reranker.from_pretrained(BUNDLED, dtype="int8", memory_budget=1, device="cpu", pruning="off")
    with pytest.raises(ValueError, match="memory_budget") as more:
        Reranker.from_pretrained(BUNDLED, dtype="float32", memory_budget=1, device="cpu", pruning="off")
    assert less.value.smallest < more.value.smallest
    documents = ["Berlin has three million inhabitants. " * n for n in range(1, 20)]
    with Reranker.from_pretrained(
        BUNDLED, dtype="int8", memory_budget=less.value.smallest, device="cpu", pruning="off"
    ) as reranker:
        streamed = reranker.rerank("How many people live in Berlin?", documents, 5)
        assert reranker.plan is not None
        assert streamed.trace.bytes_read >= reranker.plan.bytes_read() == sum(reranker.plan.sizes.layers)
        assert ("kernels" in reranker.plan.parts) == (kernels().level is not None)
    assert companion(spill_directory).stat().st_size < 22_000_000  # 85 MB in float32
    with Reranker.from_pretrained(BUNDLED, dtype="int8", device="cpu", pruning="off") as reranker:
        assert reranker.rerank("How many people live in Berlin?", documents, 5).ranking == streamed.ranking


def test_layers_begin_at_sectors_and_matrices_at_cache_lines(tiny_bert: Path, spill_directory: Path) -> None:
    load_planned(tiny_bert, packing=INT8, resident=()).close()
    path = companion(spill_directory)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    for name, tensor in parse_header(data[8 : 8 + length], path, len(data)).items():
        assert tensor.start % (64 if ".packed" in name or ".scale" in name else 4) == 0
        assert not name.endswith(".query.packed") or tensor.start % SECTOR == 0
    assert path.name.endswith("-int8.safetensors")


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:5000], lambda data: b""])
def test_a_damaged_file_is_refused_and_written_anew(tiny_bert: Path, spill_directory: Path, damage) -> None:
    expected = load_planned(tiny_bert, packing=INT8, resident=()).score(PAIRS)
    path = companion(spill_directory)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(FileError, match="delete the file"):
        load_planned(tiny_bert, packing=INT8, resident=())
    path.unlink()
    assert load_planned(tiny_bert, packing=INT8, resident=()).score(PAIRS) == expected


def test_a_flipped_bit_is_found_when_its_layer_is_first_read(tiny_bert: Path, spill_directory: Path) -> None:
    load_planned(tiny_bert, packing=INT8, resident=()).close()
    path = companion(spill_directory)
    data = bytearray(path.read_bytes())
    data[8 + int.from_bytes(data[:8], "little") + 100] ^= 1
    path.write_bytes(data)
    reranker = load_planned(tiny_bert, packing=INT8, resident=())
    with pytest.raises(FileError, match=r"layer 1 is damaged; delete the file"):
        reranker.score(PAIRS)


def test_a_file_of_other_weights_is_refused(tiny_bert: Path, tmp_path: Path, spill_directory: Path) -> None:
    load_planned(tiny_bert, packing=INT8, resident=()).close()
    mine = companion(spill_directory)
    load_planned(save_model(tmp_path / "other", "bert", seed=1), packing=INT8, resident=()).close()
    (other,) = set((spill_directory / "layers").iterdir()) - {mine}
    shutil.copy(other, mine)
    with pytest.raises(FileError, match=r"other weights.*delete the file"):
        load_planned(tiny_bert, packing=INT8, resident=())


def test_no_room_is_told_before_anything_is_written(
    tiny_bert: Path, spill_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(StorageError, match=r"quantised layers is missing.*take another dtype"):
        load_planned(tiny_bert, packing=INT8, resident=())
    assert not list((spill_directory / "layers").iterdir())


def test_who_waits_for_a_file_does_not_write_it_again(tiny_bert: Path, spill_directory: Path) -> None:
    load_planned(tiny_bert, packing=INT8, resident=()).close()
    path = companion(spill_directory)
    path.unlink()
    with ThreadPoolExecutor(2) as threads:
        with locked(path):
            loading = [threads.submit(load_planned, tiny_bert, packing=INT8, resident=()) for _ in range(2)]
            assert wait(loading, timeout=0.5).not_done == set(loading)
        found = [one.result().score(PAIRS) for one in loading]
    assert found == [load_planned(tiny_bert, packing=INT8).score(PAIRS)] * 2
    assert [one.name for one in (spill_directory / "layers").iterdir()] == [path.name]


def test_8_bits_are_refused_where_they_are_not_for() -> None:
    with pytest.raises(ValueError, match=r"dtype='int8' is for rerankers: use bits=8"):
        StreamedCausalLM.from_pretrained(BUNDLED, dtype="int8")
    with pytest.raises(ValueError, match=r"dtype='int4' is unknown; use 'auto', .*'int8'"):
        Reranker.from_pretrained(BUNDLED, dtype="int4")
    if not torch.cuda.is_available():
        return
    with pytest.raises(ValueError, match=r"dtype='int8' is for the CPU.*device='cpu', or dtype='auto'"):
        Reranker.from_pretrained(BUNDLED, dtype="int8", device="cuda")
