"""A shape is the same with weights and without."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config

from grating_core import ModelNotFoundError, UnsupportedModelError
from grating_core.columns.companion import ColumnSizes
from grating_core.lab.shape import Shape
from tests.core.conftest import save_model


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_without_weights_a_shape_is_the_same(decoder_directory: Path, tmp_path: Path, bits: int | None) -> None:
    shutil.copy(decoder_directory / "config.json", tmp_path)
    with_weights, without = (Shape.of(place, torch.bfloat16, bits, 64) for place in (decoder_directory, tmp_path))
    assert without.columns == with_weights.columns == ColumnSizes(5, 32, 48, torch.bfloat16, bits)
    assert without.head == with_weights.head
    for one, other in ((without.dense, with_weights.dense), (without.pruned, with_weights.pruned)):
        assert one.packing == other.packing
        # Layers lie at other places of the file, and are stored in float32, unless they have a file of their own.
        if bits is not None:
            assert (one.sizes.layers, one.sizes.bytes_read) == (other.sizes.layers, other.sizes.bytes_read)
        assert one.sizes.keys == other.sizes.keys
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_large_shape_needs_no_room(tmp_path: Path) -> None:
    config = Qwen3Config(
        architectures=["Qwen3ForCausalLM"], hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=151_936, tie_word_embeddings=True,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    shape = Shape.of(tmp_path, torch.bfloat16)
    sizes = shape.dense.sizes
    weights = sum(sizes.layers) + sizes.vocabulary * sizes.row + sizes.rest
    assert weights == pytest.approx(2 * 4_022_468_096, rel=1e-4)  # of Qwen3-4B, embeddings once
    assert len(shape.dense.plan(10**10).resident) == shape.depth == 36
    quantised = Shape.of(tmp_path, torch.bfloat16, 4)
    assert sum(quantised.dense.sizes.layers) == pytest.approx(sum(sizes.layers) * 4.5 / 16, rel=0.01)
    assert quantised.head == pytest.approx(shape.head / 2, rel=0.01)


def test_what_is_no_decoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError):
        Shape.of(save_model(tmp_path / "bert", "bert"), torch.float32)
    with pytest.raises(ModelNotFoundError):
        Shape.of(tmp_path / "nowhere", torch.float32)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": "wide"}))
    with pytest.raises(ModelNotFoundError):
        Shape.of(tmp_path, torch.float32)
