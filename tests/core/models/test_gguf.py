"""Language models in GGUF files against transformers' models with the weights that the files stand for."""

import random
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from grating_core.engine.decode import advance, new_cache
from grating_core.models.causal_lm import StoredCausalLM
from tests.core.conftest import DECODER, SIZES, WINDOW, randomise
from tests.core.gguf_files import write_gguf
from tests.core.models.test_decoders import CAUSAL
from tests.core.parity import TOLERANCE

LLAMA3 = {"rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 24}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": WINDOW // 4}
MODELS = {name: make for name, make in CAUSAL.items() if name != "qwen3-sliding"} | {
    "llama-biased": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **DECODER, attention_bias=True)),
    "llama-3": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **DECODER, rope_parameters=LLAMA3)),
    "llama-yarn": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **DECODER, rope_parameters=YARN)),
}
IDS = random.Random(5).choices(range(210), k=70)


def stored(path: Path) -> StoredCausalLM:
    return StoredCausalLM(path, device=torch.device("cpu"), dtype=torch.float32)


def logits(path: Path, ids: list[int]) -> torch.Tensor:
    """What comes out behind the whole sequence, whose last two tokens come one by one."""
    model = stored(path).load(None)
    cache = new_cache(model, len(ids))
    for part in (ids[:-2], ids[-2:-1], ids[-1:]):
        found = advance(model, part, cache, slice_tokens=16)
    return found


@torch.inference_mode()
def expected(model: nn.Module, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids])).logits[0, -1]


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.Q8_0, Kind.Q4_0])
@pytest.mark.parametrize("family", MODELS)
def test_logits_equal_transformers(family: str, kind: Kind, tmp_path: Path) -> None:
    if kind in (Kind.F16, Kind.Q4_0) and family not in ("llama", "gemma2", "phi3"):
        pytest.skip("other families add nothing here")
    torch.manual_seed(0)
    model = randomise(MODELS[family]()).eval()
    model.set_attn_implementation("eager")
    path = write_gguf(tmp_path / "model.gguf", model, kind)
    found = logits(path, IDS)
    torch.testing.assert_close(found, expected(model, IDS), atol=TOLERANCE, rtol=0)
    assert float(found.std()) > 0.05
