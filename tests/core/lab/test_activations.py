"""Recording and keeping the activations of a model."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from grating_core import ModelNotFoundError, UnsupportedModelError
from grating_core.columns.companion import ColumnSizes
from grating_core.errors import FileError
from grating_core.lab import activations
from grating_core.lab.activations import Activations, record_activations
from tests.core.columns.conftest import TEXT
from tests.core.conftest import save_model

SIZES = ColumnSizes(5, 32, 48, torch.float32)


@torch.inference_mode()
def plain_activations(directory: Path, tokens: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The layers written out, as transformers has them."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = PreTrainedTokenizerFast.from_pretrained(directory)(TEXT, add_special_tokens=False)["input_ids"]
    inputs, products = [], []
    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_hook(lambda module, args, out: inputs.append(out[0]))
    model.model(input_ids=torch.tensor([ids[:tokens]]))
    for layer, x in zip(model.model.layers, inputs, strict=True):
        products.append(
            torch.nn.functional.silu(x @ layer.mlp.gate_proj.weight.T) * (x @ layer.mlp.up_proj.weight.T)
        )
    return [x.abs().numpy() for x in inputs], [h.abs().numpy() for h in products]


def test_they_are_the_magnitudes_of_the_model(decoder_directory: Path, tmp_path: Path) -> None:
    found = record_activations(decoder_directory, TEXT, 60, path=tmp_path / "activations.safetensors")
    inputs, products = plain_activations(decoder_directory, 60)
    assert (found.inputs.shape[1], found.inputs.dtype) == (60, np.float16)
    np.testing.assert_allclose(found.inputs, inputs, rtol=2e-3, atol=1e-5)
    np.testing.assert_allclose(found.products, products, rtol=2e-3, atol=1e-4)


def test_long_texts_are_recorded_window_by_window(decoder_directory, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(activations, "WINDOW", 32)
    found = record_activations(decoder_directory, TEXT, 50, path=tmp_path / "activations.safetensors")
    inputs, _ = plain_activations(decoder_directory, 32)
    assert found.inputs.shape[1] == 50
    np.testing.assert_allclose(found.inputs[:, :32], inputs, rtol=2e-3, atol=1e-5)


def test_it_is_recorded_once_and_known_by_model_text_and_length(
    decoder_directory: Path, spill_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = record_activations(decoder_directory, TEXT, 20)
    record_activations(decoder_directory, TEXT, 21)
    record_activations(decoder_directory, TEXT + " w1", 20)
    assert len(list((spill_directory / "activations").iterdir())) == 3
    monkeypatch.setattr(activations, "load_decoder", None)  # nothing is computed any more
    np.testing.assert_array_equal(record_activations(decoder_directory, TEXT, 20).products, first.products)


def test_other_files_are_refused(decoder_directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "activations.safetensors"
    record_activations(decoder_directory, TEXT, 20, path=path)
    whole = path.read_bytes()
    with pytest.raises(FileError, match="another tokens"):
        record_activations(decoder_directory, TEXT, 30, path=path)
    with pytest.raises(FileError, match="another text"):
        record_activations(decoder_directory, TEXT + " w1", 20, path=path)
    other = shutil.copytree(decoder_directory, tmp_path / "other")
    shard = min(other.glob("*.safetensors"))
    save_file({name: weight + 1 for name, weight in load_file(shard).items()}, shard, {"format": "pt"})
    with pytest.raises(FileError, match="another model"):
        record_activations(other, TEXT, 20, path=path)
    path.write_bytes(whole[:-100])
    with pytest.raises(FileError, match="holds no activations"):
        record_activations(decoder_directory, TEXT, 20, path=path)


def test_nothing_is_left_of_a_recording_that_fails(decoder_directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="400 tokens, too few"):
        record_activations(decoder_directory, TEXT, 500, path=tmp_path / "kept" / "activations.safetensors")
    with pytest.raises(ValueError, match="tokens=0"):
        record_activations(decoder_directory, TEXT, 0, path=tmp_path / "kept" / "activations.safetensors")
    with pytest.raises(UnsupportedModelError):
        record_activations(
            save_model(tmp_path / "bert", "bert"), TEXT, 20, path=tmp_path / "kept" / "activations.safetensors"
        )
    with pytest.raises(ModelNotFoundError):
        record_activations(tmp_path, TEXT, 20)
    assert not list((tmp_path / "kept").glob("*"))


def test_another_shape_takes_every_channel_equally_often() -> None:
    chance = np.random.default_rng(0)
    found = Activations(*(chance.random((5, 7, width)).astype(np.float16) for width in (32, 48)))
    same = found.layer(3, SIZES)
    np.testing.assert_array_equal(same[0], found.inputs[3])
    np.testing.assert_array_equal(same[1], found.products[3])
    wide = found.layer(7, ColumnSizes(10, 64, 100, torch.float32))
    assert [part.shape for part in wide] == [(7, 64), (7, 100)]
    np.testing.assert_array_equal(np.sort(wide[0][0]), np.sort(np.repeat(found.inputs[3][0], 2)))
    times = [(wide[1][0] == value).sum() for value in np.unique(found.products[3][0])]
    assert min(times) >= 2
    assert not np.array_equal(wide[0][:, :32], wide[0][:, 32:])
    narrow = found.layer(0, ColumnSizes(5, 8, 48, torch.float32))[0]
    assert set(narrow[0]) <= set(found.inputs[0][0])
