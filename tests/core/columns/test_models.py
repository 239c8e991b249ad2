"""Whole models with pruned MLPs against transformers with masks."""

import random
import shutil
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from grating_core import BudgetError, StreamedCausalLM
from grating_core.columns import reading
from grating_core.columns.allocation import allocate
from grating_core.columns.disk import Disk
from grating_core.engine.decode import advance, new_cache
from grating_core.errors import FileError, StorageError
from grating_core.lab.masked import MaskedMlp
from grating_core.models import stored_causal_lm
from grating_core.opening.language_models import open_language_model
from grating_core.settings import GenerationSettings
from tests.core.conftest import WORDS
from tests.core.models.test_decoders import (
    CAUSAL,
    merged,
    save_adapter,
    save_decoder,
)
from tests.core.parity import going_on, random_text

TEXT = random_text(12, random.Random(5), WORDS)
DENSITY = 0.5


@pytest.fixture(autouse=True)
def companions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the companion files of this test are."""
    monkeypatch.setenv("GRATING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "columns"


@pytest.fixture(autouse=True)
def _small_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample would take more memory than all of these models, and no budget would be too small for them."""
    monkeypatch.setattr(stored_causal_lm, "sampling_bytes", lambda *_: 0)


NO_PREFERENCE = {"inputs_preference": 1, "products_preference": 1}
"""What is in memory does not change what is chosen, so that a budget changes nothing."""


def load_lm(directory: Path, **settings: object) -> StreamedCausalLM:
    return StreamedCausalLM.from_pretrained(directory, **{"dtype": "float32", "device": "cpu", **settings})


def apart(mlp: nn.Module) -> object:
    """A gated MLP with gate and up matrices of its own; in Phi-3's they are one, the gate above."""
    if not hasattr(mlp, "gate_up_proj"):
        return mlp
    gate, up = (partial(linear, weight=weight) for weight in mlp.gate_up_proj.weight.chunk(2))
    return SimpleNamespace(gate_proj=gate, up_proj=up, down_proj=mlp.down_proj, act_fn=mlp.activation_fn)


def replace_mlps(model: nn.Module) -> None:
    layers = model.model.layers
    for layer, shares in zip(layers, allocate(DENSITY, len(layers)), strict=True):
        layer.mlp = MaskedMlp(apart(layer.mlp), shares)


@torch.inference_mode()
def masked_text(directory: Path, new_tokens: int, model: nn.Module | None = None) -> str:
    """transformers' model: the prompt dense, then one token at a time with masks."""
    if model is None:  # eagerly: transformers had another way for Gemma 2 at times, which ignored its caps
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        ).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    ids = tokenizer(TEXT)["input_ids"]
    step = going_on(model)
    output = step(ids)
    replace_mlps(model)
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


def test_without_long_reads_a_budget_changes_what_is_read_and_not_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "Disk", lambda: Disk(0, 0))
    directory = save_decoder(tmp_path / "model", "qwen3")
    expected = masked_text(directory, 20)
    with pytest.raises(BudgetError) as told:
        load_lm(directory, memory_budget=1000, mlp_density=DENSITY, **NO_PREFERENCE)
    read = []
    for budget in (told.value.smallest, (told.value.smallest + told.value.resident) // 2, told.value.resident):
        with load_lm(directory, memory_budget=budget, mlp_density=DENSITY, **NO_PREFERENCE) as model:
            assert model.plan is not None
            assert model.plan.total <= budget
            for _ in range(2):  # what was read for one text does not change the next
                found = model.generate(TEXT, max_new_tokens=20)
                assert TEXT + found.text == expected
            read.append(found.bytes_read)
    assert read[0] > read[1] > read[2] == 0


@pytest.mark.parametrize("bits", [8, 4])
def test_columns_go_with_other_weights_in_fewer_bits(tmp_path: Path, companions: Path, bits: int) -> None:
    directory = save_decoder(tmp_path / "model", "qwen3")
    with load_lm(directory, bits=bits, mlp_density=DENSITY, **NO_PREFERENCE) as model:
        expected = model.generate(TEXT, max_new_tokens=20).text
    with load_lm(directory, bits=bits) as dense:
        assert expected != dense.generate(TEXT, max_new_tokens=20).text
    with pytest.raises(BudgetError) as told:
        load_lm(directory, memory_budget=1000, bits=bits, mlp_density=DENSITY, **NO_PREFERENCE)
    with load_lm(
        directory, memory_budget=told.value.smallest, bits=bits, mlp_density=DENSITY, **NO_PREFERENCE
    ) as model:
        assert model.generate(TEXT, max_new_tokens=20).text == expected
    names = {8: "8bits", 4: "4bits-weighed"}
    assert [path.name.partition("-")[2] for path in companions.iterdir()] == [f"{names[bits]}-ordered.safetensors"]


@pytest.mark.parametrize("family", CAUSAL)
def test_pruned_mlps_in_8_bits_say_nearly_what_they_say_without(family: str, tmp_path: Path) -> None:
    directory = save_decoder(tmp_path / "model", family)
    prompt = list(range(5, 25))
    found = []
    for bits in (None, 8):
        settings = GenerationSettings(
            model=str(directory), dtype="float32", device="cpu", bits=bits, mlp_density=0.99999
        )
        with closing(open_language_model(settings)) as opened, closing(opened.load().model) as model:
            cache = new_cache(model, 30)
            advance(model, prompt, cache, slice_tokens=64)
            found.append(advance(model, [7], cache, slice_tokens=64))
    plain, in_8_bits = found
    assert (plain - in_8_bits).norm() < 0.15 * plain.norm()  # another norm or residual gives more than that


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


# Bad input


@pytest.mark.parametrize("density", [0, -0.5, 1.01, float("nan"), "0.5", True])
def test_a_density_that_is_none_is_refused(density: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mlp_density=.* must be a number above 0, 1 at most"):
        load_lm(tmp_path, mlp_density=density)


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
        with pytest.raises(StorageError, match=r"cannot be written: .* 0\.0 MB are free in .*\. Make room"):
            load_lm(directory, mlp_density=DENSITY)
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
        (path,) = companions.glob("*.safetensors")
        whole = path.read_bytes()
        path.write_bytes(whole[:20_000])
        with pytest.raises(FileError, match=path.name):
            model.generate(TEXT, max_new_tokens=8)
        path.write_bytes(whole)
        assert model.generate(TEXT, max_new_tokens=8).text == expected


@pytest.mark.parametrize("name", ["inputs_preference", "products_preference"])
@pytest.mark.parametrize("value", [0, -0.1, 1.1, "much", float("nan")])
def test_a_preference_that_is_none_is_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name}={value!r} must be a number above 0, 1 at most"):
        StreamedCausalLM.from_pretrained("owner/name", **{name: value})  # type: ignore[arg-type]


def test_a_stronger_preference_finds_more_columns(tmp_path: Path) -> None:
    directory = save_decoder(tmp_path / "model", "qwen3")
    with pytest.raises(BudgetError) as told:
        load_lm(directory, memory_budget=1000, mlp_density=DENSITY)
    budget = (told.value.smallest + told.value.resident) // 2
    found = []
    for preference in (1, 0.9, 0.01):
        how = {"inputs_preference": preference, "products_preference": preference}
        with load_lm(directory, memory_budget=budget, mlp_density=DENSITY, **how) as model:
            found.append(model.generate(TEXT, max_new_tokens=20).hit_rate)
    assert found[0] <= found[1] < found[2]
