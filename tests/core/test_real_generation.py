"""A real language model, SmolLM2-135M-Instruct: the same text as transformers, within the budget."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.shapes import smollm2_file, write_smollm2
from grating_core import StreamedCausalLM

pytestmark = pytest.mark.slow

MESSAGES = [{"role": "user", "content": "Name three cities in Germany, and say a word about each. 🎉"}]
BUDGET = 300_000_000

_LONG_PROMPT = """
import re, sys, psutil
from pathlib import Path
from grating_core import StreamedCausalLM

before = psutil.Process().memory_info().rss
with StreamedCausalLM.from_pretrained(
    sys.argv[1], dtype="float32", device="cpu", memory_budget=int(sys.argv[2]), max_length=1024
) as model:
    model.generate("The city has a museum and a river. " * 105, max_new_tokens=20)
    # Not by getrusage: that begins with the peak of the process that started this one.
    peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
    print(peak - before - model.plan.tokenizer)
"""


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        smollm2_file()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return write_smollm2(tmp_path_factory.mktemp("base") / "SmolLM2-135M-Instruct")


def test_the_text_is_that_of_transformers(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    inputs = tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**inputs, max_new_tokens=80, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    with StreamedCausalLM.from_pretrained(
        smollm2, dtype="float32", device="cpu", memory_budget=BUDGET, max_length=512
    ) as streamed:
        found = streamed.generate(MESSAGES, max_new_tokens=80)
    assert found.text == tokenizer.decode(tokens, skip_special_tokens=True)
    assert found.new_tokens == len(tokens)
    assert found.bytes_read > 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak this way")
def test_a_long_prompt_keeps_to_the_budget(smollm2: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", _LONG_PROMPT, str(smollm2), str(BUDGET)], capture_output=True, text=True, check=True
    )
    assert int(finished.stdout) < BUDGET
