"""A sample of tokens tells how large the inputs of products are, and 4 bits lose less with it."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from grating_core.columns.companion import MlpWeights, write_columns
from grating_core.columns.install import MlpPruning
from grating_core.columns.order import input_errors
from grating_core.engine.decode import advance, new_cache
from grating_core.errors import ModelNotFoundError
from grating_core.models.causal_lm import CausalLM
from grating_core.models.packing import Packing, generating
from grating_core.models.sample import Sample, draw_tokens
from grating_core.models.stored_causal_lm import StoredCausalLM
from tests.core.models.test_decoders import save_decoder

MODULES = {
    "query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj",
    "output": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
PACKING = generating(4, torch.float32)

pytestmark = pytest.mark.usefixtures("spill_directory")  # no file of another test is found


@pytest.fixture(params=("llama", "qwen3", "gemma2"))
def decoder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_decoder(tmp_path, request.param)


def stored(directory: Path, packing: Packing | None, **settings: Any) -> StoredCausalLM:
    return StoredCausalLM(directory, device=torch.device("cpu"), dtype=torch.float32, packing=packing, **settings)


def reference_inputs(directory: Path, ids: Tensor) -> list[dict[str, Tensor]]:
    """Return the inputs that transformers gives each product, by role, of each layer."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    found: list[dict[str, Tensor]] = [{} for _ in model.model.layers]
    for layer, inputs in zip(model.model.layers, found, strict=True):
        for role, name in MODULES.items():

            def see(module: object, given: tuple[Tensor], role: str = role, inputs: Any = inputs) -> None:
                inputs[role] = given[0].flatten(0, 1)

            layer.get_submodule(name).register_forward_pre_hook(see)
    with torch.inference_mode():
        model(ids)
    return found


@pytest.mark.parametrize("pruning", [None, MlpPruning(0.5)])
def test_importance_is_the_mean_square_of_what_transformers_multiplies(
    decoder: Path, pruning: MlpPruning | None
) -> None:
    model = stored(decoder, None, pruning=pruning)
    expected = reference_inputs(decoder, draw_tokens(model.spec))
    assert len(model.importances) == len(expected) == model.spec.depth
    for mine, inputs in zip(model.importances, expected, strict=True):
        assert mine.keys() == inputs.keys()
        for role, states in inputs.items():
            torch.testing.assert_close(mine[role], states.square().mean(0), atol=1e-5, rtol=1e-3)
    model.close()


def test_columns_are_written_by_what_the_sample_finds(decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[MlpWeights] = []

    def watched(path: Path, weights: Iterable[MlpWeights], *more: Any, **settings: Any) -> None:
        def each() -> Iterator[MlpWeights]:
            for layer in weights:
                written.append(layer)
                yield layer

        write_columns(path, each(), *more, **settings)

    monkeypatch.setattr("grating_core.columns.install.write_columns", watched)
    model = stored(decoder, PACKING, pruning=MlpPruning(0.5, bits=4))
    model.load(None).close()
    assert len(written) == model.spec.depth
    for weights, importance in zip(written, model.importances, strict=True):
        assert weights.inputs is not None
        assert weights.input_errors is not None
        assert importance["up"].argmax() == weights.inputs[0]
        assert torch.equal(weights.input_errors, input_errors(importance))


def test_tokens_are_the_same_each_time_and_fit_the_model(decoder: Path) -> None:
    with_tokens = stored(decoder, None)
    ids = draw_tokens(with_tokens.spec)
    assert torch.equal(ids, draw_tokens(with_tokens.spec))
    assert ids.shape[1] <= with_tokens.window
    assert 0 <= ids.min() < ids.max() < with_tokens.vocabulary
    with_tokens.close()


@pytest.mark.parametrize("left", [1000, 100_000])
def test_a_model_whose_weights_go_away_says_how_to_get_them_again(decoder: Path, left: int) -> None:
    model = stored(decoder, None, pruning=MlpPruning(0.5))
    for path in decoder.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ModelNotFoundError, match="fetch the model again"):
        _ = model.importances
    model.close()


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    """A model whose norms make few entries large, as those of real models do."""
    directory = save_decoder(tmp_path / "uneven", "llama")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data = 4 * torch.rand(norm.weight.shape, generator=generator) ** 6
    model.save_pretrained(directory, max_shard_size="60KB")
    return directory


def logits(model: CausalLM, texts: Tensor) -> Tensor:
    """Return the logits after each text, which are computed as prompts are."""
    return torch.stack(
        [advance(model, ids, new_cache(model, len(ids)), slice_tokens=64) for ids in texts.tolist()]
    )


def test_on_other_texts_4_bits_lose_less_with_a_sample(uneven: Path) -> None:
    texts = torch.randint(4, 200, (16, 24), generator=torch.Generator().manual_seed(5))
    expected = logits(stored(uneven, None).load(None), texts)
    errors = {
        weighed: (logits(stored(uneven, replace(PACKING, weighed=weighed)).load(None), texts) - expected).norm()
        for weighed in (True, False)
    }
    assert 0 < errors[True] < 0.95 * errors[False]


@pytest.mark.parametrize("pruning", [None, MlpPruning(0.5, bits=4)])
def test_a_sample_goes_through_the_layers_once_while_a_model_is_loaded(
    uneven: Path, pruning: MlpPruning | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[dict[str, Tensor]] = []
    real = Sample.importance

    def counted(self: Sample, *given: Any) -> dict[str, Tensor]:
        steps.append(real(self, *given))
        return steps[-1]

    monkeypatch.setattr(Sample, "importance", counted)
    model = stored(uneven, PACKING, pruning=pruning)
    model.load(None).close()
    assert len(steps) == model.spec.depth


def test_the_companion_file_is_named_after_the_way_of_rounding(uneven: Path, spill_directory: Path) -> None:
    for packing in (PACKING, replace(PACKING, weighed=False), generating(8, torch.float32)):
        stored(uneven, packing).load(None)
    stored(uneven, PACKING, pruning=MlpPruning(0.5, bits=4)).load(None).close()
    names = [path.stem.partition("-")[2] for path in (spill_directory / "layers").iterdir()]
    assert sorted(names) == [
        "int8-output-int8",
        "q4z-output-int8",
        "q4z-weighed-output-int8",
        "q4z-weighed-output-int8-without-down-without-gate-without-up",
    ]


def test_memory_for_the_sample_is_planned_where_a_file_is_written(uneven: Path) -> None:
    with_sample, without = (stored(uneven, replace(PACKING, weighed=weighed)) for weighed in (True, False))
    sample = with_sample.sizes(64).writing - without.sizes(64).writing
    hidden = draw_tokens(with_sample.spec).numel() * with_sample.spec.width * 4
    assert sample > 2 * hidden
    with_sample.close()
    without.close()
