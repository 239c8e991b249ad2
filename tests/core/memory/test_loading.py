"""Resident layers take the memory that they are said to take, whatever the process has freed before."""

import subprocess
import sys

import pytest

from grating_core.kernels.choice import kernels

_LOADING = """
import torch
from grating_core.memory.meter import resident_memory
from grating_core.models.cross_encoder import StoredCrossEncoder
from grating_core.models.directory import find_model

torch.empty(30_000_000, dtype=torch.int8).fill_(1)  # smaller blocks now come from the heap of the C library
model = find_model("bundled:ms-marco-minilm-l12")
stored = StoredCrossEncoder(model, device=torch.device("cpu"), dtype=torch.bfloat16)
sizes, before = stored.sizes(stored.window), resident_memory()
loaded = stored.load(None)
print(resident_memory() - before, sum(sizes.layers), sizes.vocabulary * sizes.row)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or kernels().level is None, reason="only kernels pack, and only some heaps give back"
)
def test_what_packing_copies_is_given_back() -> None:
    finished = subprocess.run([sys.executable, "-c", _LOADING], capture_output=True, text=True, check=True)
    grown, layers, table = map(int, finished.stdout.split())
    assert grown - table < 1.6 * layers
