"""A process that reranks texts of ever new lengths does not grow with each of them."""

import subprocess
import sys

import pytest

from grating_core.kernels.choice import kernels

_REQUESTS = """
import sys
import psutil
from grating_core import Reranker

requests, lengths = int(sys.argv[2]), int(sys.argv[3])
words = "the city people live berlin bread museum water river census year house".split()
text = lambda count: " ".join(words[place % len(words)] for place in range(count))
with Reranker.from_pretrained("bundled:ms-marco-minilm-l12", dtype=sys.argv[1], memory_budget="110MB") as reranker:
    for number in range(requests):
        texts = [text(1 + (number * 7 + each) % lengths) for each in range(20 if lengths < 200 else 1)]
        reranker.rerank(text(3), texts, 1)
        if number in (requests // 4, requests - 1):
            print(psutil.Process().memory_info().rss)
"""


def growth(dtype: str, requests: int, lengths: int) -> int:
    """Return by how many bytes a process grows while it answers the last three quarters of its requests."""
    command = [sys.executable, "-c", _REQUESTS, dtype, str(requests), str(lengths)]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    before, after = map(int, finished.stdout.split())
    return after - before


@pytest.mark.slow
def test_new_lengths_cost_no_memory() -> None:
    # A matrix kernel for every pair of lengths took torch 130 MB for these requests.
    assert growth("bfloat16", 24, 100) < 40e6


@pytest.mark.slow
@pytest.mark.skipif(kernels().level is None, reason=kernels().reason)
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_kernels_keep_nothing_for_a_length(dtype: str) -> None:
    assert growth(dtype, 5000, 500) < 8e6  # each length from 1 to 500 words comes ten times
