"""Blocks of few bits against the package gguf."""

import gguf
import numpy as np
import pytest
import torch

from grating_core.memory.blocks import BLOCKS, READABLE, decoded, groups_of, row_bytes

HALVES = {"Q6_K": (208,), "Q8_0": (0,), "Q4_0": (0,), "Q5_0": (0,)}  # where scales begin; else 0 and 2


@pytest.mark.parametrize("kind", BLOCKS)
def test_any_bytes_are_the_numbers_that_the_package_gguf_gives(kind: str) -> None:
    chance = np.random.default_rng(7)
    block = BLOCKS[kind]
    data = chance.integers(0, 256, size=(6 * 3, block.bytes), dtype=np.uint8)
    for start in HALVES.get(kind, (0, 2)):
        data[:, start : start + 2] = chance.normal(size=(len(data), 1)).astype(np.float16).view(np.uint8)
    data = data.reshape(6, -1)
    width = 3 * block.entries
    assert row_bytes(kind, width) == data.shape[1]
    found = decoded(kind, torch.from_numpy(data).flatten(), width)
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-6)
    entries, scale, minimum = groups_of(kind, torch.from_numpy(data).flatten(), width)
    assert entries.dtype == torch.int8
    assert scale.shape == entries.shape[:2]
    assert minimum is None or minimum.shape == scale.shape


@pytest.mark.parametrize("kind", sorted(READABLE - BLOCKS.keys()))
def test_floats_stay_as_they_are_stored(kind: str) -> None:
    rows = torch.randn(3, 5).to(
        {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16}.get(kind, torch.bfloat16)
    )
    data = rows.view(torch.uint8).flatten()
    shifted = torch.cat((data.new_zeros(1), data))[1:]  # at an odd byte
    for stored in (data, shifted):
        assert torch.equal(decoded(kind, stored, 5), rows)
