"""Weights in 8 and 4 bits keep to the budget, in the process that writes their file and in the next one."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from grating_core import BudgetError, StreamedCausalLM
from tests.core.conftest import save_tokenizer

pytestmark = [
    pytest.mark.slow,  # each process imports torch
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak this way"),
]

_HOW: dict[str, Any] = {"dtype": "bfloat16", "device": "cpu", "max_length": 128}
_RUN = """
import re, sys
from pathlib import Path
from grating_core import StreamedCausalLM

def bytes_of(what):
    return 1024 * int(re.search(what + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = bytes_of("VmRSS")
directory, bits, budget = sys.argv[1:]
how = dict(bits=int(bits), dtype="bfloat16", device="cpu", max_length=128)
with StreamedCausalLM.from_pretrained(directory, memory_budget=int(budget), **how) as model:
    model.generate("w1 w2 w3 " * 20, max_new_tokens=4)
    print(bytes_of("VmHWM") - before - model.plan.tokenizer, model.plan.total, len(model.plan.streamed))
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 252 MB in bfloat16, whose MLPs are far wider than its states."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=210, hidden_size=512, intermediate_size=20_480, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=128, tie_word_embeddings=True, pad_token_id=1,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("wide")
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    save_tokenizer(directory, types=False)
    return directory


@pytest.mark.parametrize("bits", [8, 4])
def test_peaks_stay_below_budget_and_plan(wide: Path, bits: int, spill_directory: Path) -> None:
    with pytest.raises(BudgetError) as told:
        StreamedCausalLM.from_pretrained(wide, bits=bits, memory_budget=1, **_HOW)
    smallest, resident = told.value.smallest, told.value.resident
    first, _, _ = run(wide, bits, smallest)
    assert len(list((spill_directory / "layers").iterdir())) == 1
    assert first <= smallest
    second, planned, streamed = run(wide, bits, resident)
    assert streamed == 0
    assert second <= planned


def run(directory: Path, bits: int, budget: int) -> tuple[int, int, int]:
    """Return the peak after imports, what was planned, and how many layers were streamed."""
    command = [sys.executable, "-c", _RUN, str(directory), str(bits), str(budget)]
    peak, planned, streamed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return int(peak), int(planned), int(streamed)
