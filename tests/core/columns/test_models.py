"""Whole models with pruned MLPs against transformers with masks."""

import random
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from grating_core import BudgetError, Reranker, StreamedCausalLM, UnsupportedModelError
from grating_core.columns.allocation import allocate
from grating_core.columns.cache import NO_PREFERENCE
from grating_core.columns.install import MlpPruning
from grating_core.columns.masks import MaskedMlp, Shares, kept
from grating_core.errors import FileError, StorageError
from tests.core.conftest import WORDS, save_model
from tests.core.models.test_decoders import (
    CAUSAL,
    DOCUMENTS,
    PROMPT,
    QUERY,
    merged,
    reference,
    save_adapter,
    save_decoder,
    spelled_out,
)
from tests.core.parity import TOLERANCE, going_on, random_text

TEXT = random_text(12, random.Random(5), WORDS)
DENSITY = 0.5


@pytest.fixture(autouse=True)
def companions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the companion files of this test are."""
    monkeypatch.setenv("GRATING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "columns"


@pytest.fixture
def no_preference(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in memory does not change what is chosen, so that a budget changes nothing."""

    def pruning(mlp_density: float, *, by_chunk: bool, show_progress: bool) -> MlpPruning:
        return MlpPruning(mlp_density, by_chunk, NO_PREFERENCE)

    monkeypatch.setattr("grating_core.generation.mlp_pruning", pruning)
    monkeypatch.setattr("grating_core.reranker.mlp_pruning", pruning)


def load_lm(directory: Path, **settings: object) -> StreamedCausalLM:
    return StreamedCausalLM.from_pretrained(directory, **{"dtype": "float32", "device": "cpu", **settings})


def load_reranker(directory: Path, **settings: object) -> Reranker:
    how = {"dtype": "float32", "device": "cpu", "template": PROMPT, "pruning": "off", **settings}
    return Reranker.from_pretrained(directory, **how)


def replace_mlps(model: nn.Module, make: Callable[[nn.Module, Shares, bool], nn.Module]) -> None:
    layers = model.model.layers
    for number, (layer, shares) in enumerate(zip(layers, allocate(DENSITY, len(layers)), strict=True), 1):
        layer.mlp = make(layer.mlp, shares, number == len(layers))


@torch.inference_mode()
def masked_text(directory: Path, new_tokens: int, model: nn.Module | None = None) -> str:
    """transformers' model: the prompt dense, then one token at a time with masks."""
    model = model or AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    ids = tokenizer(TEXT)["input_ids"]
    step = going_on(model)
    output = step(ids)
    replace_mlps(model, lambda mlp, shares, last: MaskedMlp(mlp, shares))
    found = []
    while True:
        found.append(int(output.logits[0, -1].argmax()))
        if len(found) == new_tokens or found[-1] == model.generation_config.eos_token_id:
            return tokenizer.decode(ids + found, skip_special_tokens=True)
        output = step(found[-1:])


@pytest.mark.parametrize("family", CAUSAL)
def test_text_is_that_of_masks(family: str, tmp_path: Path) -> None:
    directory = save_decoder(tmp_path / "model", family)
    with load_lm(directory) as dense, load_lm(directory, mlp_density=DENSITY) as pruned:
        found = pruned.generate(TEXT, max_new_tokens=30)
        assert found.text != dense.generate(TEXT, max_new_tokens=30).text
    assert TEXT + found.text == masked_text(directory, 30)
    assert found.bytes_read == 0


@pytest.mark.usefixtures("no_preference")
def test_a_budget_changes_what_is_read_and_not_the_text(tmp_path: Path) -> None:
    directory = save_decoder(tmp_path / "model", "qwen3")
    expected = masked_text(directory, 20)
    with pytest.raises(BudgetError) as told:
        load_lm(directory, memory_budget=1000, mlp_density=DENSITY)
    read = []
    for budget in (told.value.smallest, (told.value.smallest + told.value.resident) // 2, told.value.resident):
        with load_lm(directory, memory_budget=budget, mlp_density=DENSITY) as model:
            assert model.plan is not None
            assert model.plan.total <= budget
            for _ in range(2):  # what was read for one text does not change the next
                found = model.generate(TEXT, max_new_tokens=20)
                assert TEXT + found.text == expected
            read.append(found.bytes_read)
    assert read[0] > read[1] > read[2] == 0


def test_a_density_of_one_is_the_dense_model(tmp_path: Path, companions: Path) -> None:
    directory = save_decoder(tmp_path / "model", "llama")
    with load_lm(directory) as dense, load_lm(directory, mlp_density=1.0) as whole:
        assert whole.generate(TEXT, max_new_tokens=20).text == dense.generate(TEXT, max_new_tokens=20).text
    assert not companions.exists()


def test_an_adapter_is_in_the_columns(tmp_path: Path, companions: Path) -> None:
    directory = save_decoder(tmp_path / "model", "qwen3")
    adapter = save_adapter(tmp_path / "adapter", directory)
    with load_lm(directory, mlp_density=DENSITY, adapter=adapter) as model:
        found = model.generate(TEXT, max_new_tokens=20)
    assert TEXT + found.text == masked_text(directory, 20, merged(directory, adapter, 1.5))
    load_lm(directory, mlp_density=0.9).close()
    load_lm(directory, mlp_density=0.2).close()
    assert len(list(companions.iterdir())) == 2  # one with the adapter, one without, whatever the density


class ByChunk(nn.Module):
    """The plain reference of what a chunk computes: the same columns for all tokens that go on."""

    def __init__(self, mlp: nn.Module, shares: Shares, last: bool) -> None:
        super().__init__()
        self.mlp, self.shares, self.last = mlp, shares, last

    def forward(self, hidden: Tensor) -> Tensor:
        if self.last:  # only the scoring position goes through the last MLP
            hidden = hidden[:, -1:].expand_as(hidden)
        hidden = self.keep(hidden, self.shares.inputs)
        mlp = self.mlp
        product = mlp.act_fn(mlp.gate_proj(hidden)) * mlp.up_proj(hidden)
        return mlp.down_proj(self.keep(product, self.shares.products))

    def keep(self, values: Tensor, share: float) -> Tensor:
        mask = torch.zeros(values.shape[-1])
        mask[values.abs().sum((0, 1)).topk(kept(values.shape[-1], share)).indices] = 1
        return values * mask


@pytest.mark.parametrize("family", CAUSAL)
def test_scores_are_those_of_columns_chosen_for_the_chunk(family: str, tmp_path: Path) -> None:
    directory = save_decoder(tmp_path / "model", family)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    replace_mlps(model, ByChunk)
    reranker, dense = load_reranker(directory, mlp_density=DENSITY), load_reranker(directory)
    for text in DOCUMENTS:
        expected = reference(directory, [spelled_out(directory, QUERY, text)], model=model)
        assert reranker.score([(QUERY, text)]) == pytest.approx(expected, abs=TOLERANCE)
        assert reranker.score([(QUERY, text)]) != pytest.approx(dense.score([(QUERY, text)]), abs=TOLERANCE)
    reranker.close()


@pytest.mark.usefixtures("no_preference")
def test_a_budget_changes_what_a_rerank_reads_and_not_its_scores(tmp_path: Path) -> None:
    directory = save_decoder(tmp_path / "model", "llama")
    pairs = [(QUERY, text) for text in DOCUMENTS[:4]]
    whole = load_reranker(directory, mlp_density=DENSITY, chunk_tokens=1)
    expected = [whole.score([pair])[0] for pair in pairs]
    with pytest.raises(BudgetError) as told:
        load_reranker(directory, memory_budget=1000, mlp_density=DENSITY)
    for budget in (told.value.smallest, told.value.resident):
        with load_reranker(directory, memory_budget=budget, mlp_density=DENSITY) as reranker:
            assert reranker.plan is not None
            assert reranker.plan.total <= budget
            assert [reranker.score([pair])[0] for pair in pairs] == pytest.approx(expected, abs=TOLERANCE)
    whole.close()


def test_threads_take_turns(tmp_path: Path) -> None:
    directory = save_decoder(tmp_path / "model", "llama")
    with load_reranker(directory, mlp_density=DENSITY) as reranker, ThreadPoolExecutor(4) as threads:
        expected = [reranker.score([(QUERY, text)]) for text in DOCUMENTS]
        found = list(threads.map(lambda text: reranker.score([(QUERY, text)]), DOCUMENTS))
    assert found == expected


# Bad input


@pytest.mark.parametrize("density", [0, -0.5, 1.01, float("nan"), "0.5", True])
def test_a_density_that_is_none_is_refused(density: object, tmp_path: Path) -> None:
    for load in (load_lm, load_reranker):
        with pytest.raises(ValueError, match=r"mlp_density=.* must be a number above 0, 1 at most"):
            load(tmp_path, mlp_density=density)


def test_models_without_gated_mlps_are_refused(tmp_path: Path, companions: Path) -> None:
    directory = save_model(tmp_path / "bert", "bert")
    with pytest.raises(UnsupportedModelError, match=r"mlp_density is for models with gated MLPs.*has none"):
        Reranker.from_pretrained(directory, mlp_density=0.5)
    assert not companions.exists()


def test_a_budget_that_is_too_small_is_told_before_anything_is_written(tmp_path: Path, companions: Path) -> None:
    directory = save_decoder(tmp_path / "model", "llama")
    with pytest.raises(BudgetError):
        load_lm(directory, mlp_density=0.5, memory_budget="1MB")
    assert not companions.exists()


def test_a_companion_file_of_other_weights_is_refused_and_written_anew_when_deleted(
    tmp_path: Path, companions: Path
) -> None:
    directory, other = save_decoder(tmp_path / "model", "llama"), save_decoder(tmp_path / "other", "llama-tied")
    for place in (directory, other):
        load_lm(place, mlp_density=DENSITY).close()
    mine, theirs = sorted(companions.iterdir())
    theirs.replace(mine)
    refused = []
    for place in (directory, other):
        try:
            load_lm(place, mlp_density=DENSITY).close()
        except FileError as error:
            refused.append(str(error))
    assert len(refused) == 1
    assert str(mine) in refused[0]
    assert "delete the file" in refused[0]
    mine.unlink()
    for place in (directory, other):
        load_lm(place, mlp_density=DENSITY).close()
    assert len(list(companions.iterdir())) == 2


def test_no_room_for_the_companion_file_is_told_and_leaves_nothing(
    tmp_path: Path, companions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = save_decoder(tmp_path / "model", "llama")
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
        for load in (load_lm, load_reranker):
            with pytest.raises(StorageError, match=r"cannot be written: .* 0\.0 MB are free in .*\. Make room"):
                load(directory, mlp_density=DENSITY)
    assert not list(companions.iterdir())
    load_lm(directory, mlp_density=DENSITY).close()


def test_a_companion_file_that_goes_away_while_generating_is_missed_and_found_again(
    tmp_path: Path, companions: Path
) -> None:
    directory = save_decoder(tmp_path / "model", "qwen3")
    with pytest.raises(BudgetError) as told:
        load_lm(directory, memory_budget=1000, mlp_density=DENSITY)
    with load_lm(directory, memory_budget=told.value.smallest, mlp_density=DENSITY) as model:
        expected = model.generate(TEXT, max_new_tokens=8).text
        (path,) = companions.iterdir()
        whole = path.read_bytes()
        path.write_bytes(whole[:20_000])
        with pytest.raises(FileError, match=path.name):
            model.generate(TEXT, max_new_tokens=8)
        path.write_bytes(whole)
        assert model.generate(TEXT, max_new_tokens=8).text == expected
