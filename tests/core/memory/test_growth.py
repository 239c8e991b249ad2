"""A process that reranks texts of ever new lengths does not grow with each of them."""

import subprocess
import sys

import pytest

_REQUESTS = """
import random
import psutil
from grating_core import Reranker

chance = random.Random(0)
words = "the city people live berlin bread museum water river census year house".split()
text = lambda most: " ".join(chance.choices(words, k=chance.randint(3, most)))
with Reranker.from_pretrained("bundled:ms-marco-minilm-l12", dtype="bfloat16", memory_budget="110MB") as reranker:
    for number in range(24):
        reranker.rerank(text(20), [text(100) for _ in range(20)], 5)
        if number in (7, 23):
            print(psutil.Process().memory_info().rss)
"""


@pytest.mark.slow
def test_new_lengths_cost_no_memory():
    finished = subprocess.run([sys.executable, "-c", _REQUESTS], capture_output=True, text=True, check=True)
    before, after = map(int, finished.stdout.split())
    # A matrix kernel for every pair of lengths took 130 MB for these 16 requests.
    assert after - before < 40e6
