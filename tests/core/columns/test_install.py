from dataclasses import replace

import pytest
import torch

from grating_core.columns.install import column_sizes
from grating_core.errors import UnsupportedModelError
from grating_core.layers.spec import LayerSpec, Norm

GATED = LayerSpec(
    width=8, heads=2, key_heads=1, head_size=4, inner=20, norm=Norm("rms", 1e-6), activation="silu", gated=True
)


def test_sizes_are_those_of_the_layers() -> None:
    sizes = column_sizes([GATED] * 3, torch.bfloat16)
    assert (sizes.depth, sizes.width, sizes.products, sizes.dtype) == (3, 8, 20, torch.bfloat16)


def test_a_model_with_a_layer_without_a_gate_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"gated MLPs.*layer 2 of this model has none"):
        column_sizes([GATED, replace(GATED, gated=False), GATED], torch.float32)
