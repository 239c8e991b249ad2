"""Importing a package is quick; torch and the frameworks come with the first name that needs them."""

import json
import subprocess
import sys

import pytest

_SEEN = """
import json, sys
import {package}
print(json.dumps([name for name in sys.modules if name.split(".")[0] in {heavy!r}]))
assert all(getattr({package}, name).__name__ == name for name in {package}.__all__)
assert "torch" in sys.modules
"""

EVERY = pytest.mark.parametrize(
    "package", ["langchain_grating", "llama_index.llms.grating", "llama_index.postprocessor.grating"]
)


@EVERY
def test_an_import_brings_nothing_along(package):
    heavy = ("torch", "transformers", "numpy", "pydantic", "langchain_core", "langgraph", "grating_core")
    code = _SEEN.format(package=package, heavy=heavy)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


@EVERY
def test_what_is_not_there_is_an_error(package):
    module = __import__(package, fromlist=["x"])
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'GratingShop'"):
        module.GratingShop  # noqa: B018


_RERANKS = """
import sys
from grating_core.reranker import Reranker
for settings in ({"pruning": "off"}, {"pruning": "auto"}):
    with Reranker.from_pretrained("bundled:ms-marco-minilm-l12", **settings) as reranker:
        reranker.rerank("Who?", ["Nobody.", "Somebody.", "Everybody."], top_k=1)
print("sklearn" in sys.modules)
"""


def test_only_calibration_and_the_cluster_policy_need_scikit_learn():
    done = subprocess.run([sys.executable, "-c", _RERANKS], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
