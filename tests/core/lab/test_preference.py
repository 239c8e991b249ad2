"""Fitting the preference for columns in memory: against the definition, and that a model takes it by itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from grating_core import StreamedCausalLM
from grating_core.cli.commands import app
from grating_core.columns import reading
from grating_core.columns.allocation import allocate
from grating_core.columns.cache import NO_PREFERENCE, Caching, Preference
from grating_core.columns.companion import KINDS
from grating_core.columns.disk import Disk
from grating_core.columns.preference import read_fits
from grating_core.errors import BudgetError
from grating_core.lab import preference as preference_module
from grating_core.lab.decoders import load_decoder
from grating_core.lab.preference import ERROR_ALLOWED, GAMMAS, fit_preference, record_inputs
from grating_core.lab.quality import CachedMlp, cut_windows
from grating_core.lab.simulator import find_order
from grating_core.models import stored_causal_lm
from grating_core.models.identity import fingerprint
from tests.core.columns.conftest import TEXT

DENSITY, SHARE = 0.5, 0.5


@pytest.fixture(scope="module")
def model(decoder_directory: Path) -> Any:
    return load_decoder(decoder_directory)[0]


@pytest.fixture(scope="module")
def inputs(decoder_directory: Path, model: Any) -> dict[int, torch.Tensor]:
    tokenizer = load_decoder(decoder_directory)[1]
    return record_inputs(model, list(cut_windows(tokenizer, TEXT, 64, 3)))


def measured(model: Any, inputs: dict[int, torch.Tensor], preference: Preference) -> tuple[float, int]:
    """The mean error of the MLPs' outputs, and the missing columns, both choices with their preference at once."""
    errors, missing = [], 0
    for index, states in inputs.items():
        mlp = model.model.layers[index].mlp
        with torch.inference_mode():
            dense = mlp(states)
            orders = [
                find_order(values.numpy())
                for values in (states, mlp.act_fn(mlp.gate_proj(states)) * mlp.up_proj(states))
            ]
            cached = CachedMlp(mlp, allocate(DENSITY, 5)[index], Caching(SHARE, preference), orders, (200, 200))
            errors.append(float((cached(states) - dense).square().sum() / dense.square().sum()))
        rows = [cached.sizes.row_bytes(kind) for kind in KINDS]
        missing += int(((cached.wanted - cached.hits) * rows).sum())
    return sum(errors) / len(errors), missing


@pytest.fixture(autouse=True)
def _short_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """A usual gap is as long as these small tables."""
    for module in (preference_module, reading):
        monkeypatch.setattr(module, "Disk", lambda: Disk(200, 200))
    # A sample would take more memory than all of this model, and everything would fit into every budget.
    monkeypatch.setattr(stored_causal_lm, "sampling_bytes", lambda *_: 0)


def test_inputs_are_those_of_the_mlps(model: Any, inputs: dict[int, torch.Tensor]) -> None:
    assert list(inputs) == list(range(len(model.model.layers)))
    assert all(states.shape == (192, model.config.hidden_size) for states in inputs.values())


def test_the_error_is_within_the_bound_and_the_reads_are_fewer(
    model: Any, inputs: dict[int, torch.Tensor]
) -> None:
    found = fit_preference(model, inputs, DENSITY, SHARE)
    plain, plain_missing = measured(model, inputs, NO_PREFERENCE)
    error, missing = measured(model, inputs, found.preference)
    assert found.plain_error == pytest.approx(plain, rel=0.3)  # errors of the two kinds add up nearly
    assert found.error <= ERROR_ALLOWED * found.plain_error
    assert found.error == pytest.approx(error, rel=0.3)
    assert missing < plain_missing
    assert found.saved > 0
    assert {found.preference.inputs, found.preference.products} <= set(GAMMAS)
    assert found == fit_preference(model, inputs, DENSITY, SHARE)


def test_with_all_columns_in_memory_nothing_is_preferred(model: Any, inputs: dict[int, torch.Tensor]) -> None:
    found = fit_preference(model, inputs, DENSITY, 1.0)
    assert (found.preference, found.saved) == (NO_PREFERENCE, 0)


def test_loading_takes_what_simulate_has_fitted(
    decoder_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRATING_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    load = {"mlp_density": DENSITY, "dtype": "float32", "device": "cpu"}

    def hit_rate(budget: int, **settings: float) -> float | None:
        with StreamedCausalLM.from_pretrained(
            decoder_directory, memory_budget=budget, **load, **settings
        ) as loaded:
            return loaded.generate(TEXT[:60], max_new_tokens=24).hit_rate

    with pytest.raises(BudgetError) as told:
        StreamedCausalLM.from_pretrained(decoder_directory, memory_budget=1000, **load)
    budget = (told.value.smallest + told.value.resident) // 2
    before = hit_rate(budget)
    options = ["--text", str(tmp_path / "text.txt"), "--memory-budget", str(budget), "--machine", "nvme"]
    options += ["--tokens", "128", "--dtype", "float32", "--mlp-density", str(DENSITY), "--fit-preference"]
    done = CliRunner().invoke(app, ["simulate", str(decoder_directory), *options])
    assert done.exit_code == 0, done.stderr
    (fit,) = read_fits(fingerprint(decoder_directory))
    assert fit.density == DENSITY
    assert f"inputs_preference={fit.preference.inputs}" in done.stderr
    fitted = hit_rate(budget)
    as_fitted = {"inputs_preference": fit.preference.inputs, "products_preference": fit.preference.products}
    assert fitted == hit_rate(budget, **as_fitted)
    assert hit_rate(budget, inputs_preference=0.9, products_preference=0.7) == before
    (path,) = (tmp_path / "cache" / "preferences").glob("*.json")
    fields = json.loads(path.read_text())
    fields["fits"][0]["preference"] = {"inputs": 0.01, "products": 0.01}
    path.write_text(json.dumps(fields))
    assert hit_rate(budget) == hit_rate(budget, inputs_preference=0.01, products_preference=0.01) != before


def test_a_fit_for_another_shape_is_refused(decoder_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    options = ["--text", str(tmp_path / "text.txt"), "--memory-budget", "1GB", "--shape", str(decoder_directory)]
    done = CliRunner().invoke(app, ["simulate", str(decoder_directory), *options, "--fit-preference"])
    assert done.exit_code == 2
    assert "leave one of them out" in " ".join(done.stderr.split())
