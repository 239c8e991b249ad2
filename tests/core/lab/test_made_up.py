"""Made-up models are run by the engine."""

from contextlib import closing
from pathlib import Path

import pytest
import torch

from grating_core.columns.install import MlpPruning, install
from grating_core.columns.reading import ColumnFile
from grating_core.engine.decode import advance, new_cache
from grating_core.lab.made_up import NAME, make_parts, stream_parts, write_made_up_columns
from grating_core.lab.shape import Shape
from grating_core.memory.meter import Meter
from grating_core.models.causal_lm import CausalLM


@pytest.mark.parametrize(("bits", "kv_bits"), [(None, None), (8, None), (4, 8)])
def test_a_streamed_model_computes_what_one_in_memory_does(
    decoder_directory: Path, tmp_path: Path, bits: int | None, kv_bits: int | None
) -> None:
    shape = Shape.of(decoder_directory, torch.float32, bits, kv_bits=kv_bits)
    parts = make_parts(shape, shape.dense, 4)
    with closing(stream_parts(parts, shape, tmp_path / "layers.safetensors")) as streamed:
        resident, other = (CausalLM(one) for one in (parts, streamed))
        assert resident.depth == 4
        assert resident.kv_bits == other.kv_bits == kv_bits
        for _ in range(2):
            before = other.meter.bytes_read
            one, same = (advance(model, [3], new_cache(model, 2), slice_tokens=1) for model in (resident, other))
            assert torch.equal(one, same)
            assert other.meter.bytes_read - before == pytest.approx(sum(shape.dense.sizes.bytes_read[:4]), rel=0.2)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_made_up_columns_are_read_as_real_ones(decoder_directory: Path, tmp_path: Path, bits: int | None) -> None:
    shape = Shape.of(decoder_directory, torch.float32, bits)
    write_made_up_columns(tmp_path / "columns.safetensors", shape.columns)
    with closing(ColumnFile(tmp_path / "columns.safetensors", shape.columns, NAME)) as file:
        found = []
        for share in (1.0, 0.0):
            meter = Meter()
            mlps, _ = install(shape.spec.layers, file, MlpPruning(0.5, bits=bits), share, meter)
            model = CausalLM(make_parts(shape, shape.pruned, 5, mlps))
            found.append(advance(model, [3], new_cache(model, 2), slice_tokens=1))
            assert meter.column_hit_rate == share
        torch.testing.assert_close(*found)
