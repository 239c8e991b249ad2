"""Writing a companion file takes the memory that it is said to take."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from grating_core.columns.companion import ColumnSizes, writing_bytes
from grating_core.columns.install import MlpPruning
from grating_core.errors import BudgetError
from grating_core.kernels.choice import kernels
from grating_core.memory.plan import make_generation_plan
from grating_core.models.packing import generating
from grating_core.models.stored_causal_lm import StoredCausalLM

_WRITING = """
import sys
from pathlib import Path
import torch
from grating_core.columns.companion import ColumnSizes, MlpWeights, write_columns
from grating_core.memory.meter import resident_memory, return_freed_memory

directory, bits = Path(sys.argv[1]), int(sys.argv[2]) or None
matrices = tuple(torch.ones(shape, dtype=torch.bfloat16) for shape in ((4096, 1024), (4096, 1024), (1024, 4096)))


def write(name: str, width: int) -> None:
    sizes = ColumnSizes(1, width, 4096, torch.bfloat16, bits)
    up, gate, down = matrices
    write_columns(directory / name, [MlpWeights(up[:, :width], gate[:, :width], down[:width])], sizes, "")


write("first", 8)  # loads code
return_freed_memory()
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = resident_memory()
write("second", 1024)
lines = Path("/proc/self/status").read_text().splitlines()
(peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM"))
print(int(peak) * 1024 - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only some heaps give back what was freed")
@pytest.mark.parametrize("bits", [0, 4])
def test_copies_of_few_columns_are_in_memory(tmp_path: Path, bits: int) -> None:
    command = [sys.executable, "-c", _WRITING, str(tmp_path), str(bits)]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(finished.stdout) < writing_bytes(ColumnSizes(1, 1024, 4096, torch.bfloat16, bits or None))


def test_a_budget_pays_for_writing(decoder_directory: Path) -> None:
    stored = StoredCausalLM(
        decoder_directory, device=torch.device("cpu"), dtype=torch.float32, pruning=MlpPruning(0.5)
    )
    sizes = stored.sizes(64)
    stored.close()
    assert sizes.writing > sizes.columns // 4  # a layer of four, and copies
    much = replace(sizes, writing=10 * sizes.columns + 100_000_000)
    with pytest.raises(BudgetError) as told:
        make_generation_plan(much, 1000, 64)
    assert told.value.smallest == much.runtime + much.writing


@pytest.mark.skipif(kernels().level is None, reason="without kernels, torch computes quantised layers")
def test_a_budget_does_not_pay_for_torch_where_kernels_compute_attention(decoder_directory: Path) -> None:
    how = {"device": torch.device("cpu"), "dtype": torch.float32}
    dense = StoredCausalLM(decoder_directory, packing=generating(4, torch.float32), **how)  # type: ignore[arg-type]
    pruned = StoredCausalLM(
        decoder_directory,
        pruning=MlpPruning(0.5, bits=4),
        packing=generating(4, torch.float32),
        **how,  # type: ignore[arg-type]
    )
    sizes, expected = pruned.sizes(64), dense.sizes(64)
    assert (sizes.runtime, sizes.kernels, sizes.rest) == (expected.runtime, expected.kernels, expected.rest)
    dense.close()
    pruned.close()
