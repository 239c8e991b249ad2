"""Importing a package is quick; torch and the frameworks come with the first name that needs them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.core.conftest import BUNDLED, save_model
from tests.core.models.test_decoders import save_decoder

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


_RANKS = """
import sys
from grating_core import Prompt, Reranker
model, family, *slow = sys.argv[1:]
template = Prompt(("{query} {document}",), yes="w1", no="w2") if family == "asked" else None
for settings in ({"pruning": "off"}, {"pruning": "auto"}, {"memory_budget": "200MB"}):
    with Reranker.from_pretrained(model, template=template, device="cpu", **settings) as reranker:
        reranker.rerank("w1 w2", ["w3.", "w4 w5.", "w1 w2 w3."], top_k=1)
print(*sorted({name.split(".")[0] for name in sys.modules} & set(slow)))
"""

# transformers and its train take seconds and 150 MB. Calibration and the cluster policy need scikit-learn.
SLOW = ("accelerate", "huggingface_hub", "jinja2", "onnx", "pandas", "scipy", "sklearn", "sympy", "transformers")


@pytest.mark.parametrize("family", ["bundled", "xlm-roberta", "asked"])
def test_a_first_ranking_imports_nothing_slow(family: str, tmp_path: Path):
    if family == "bundled":
        model = BUNDLED
    else:
        model = save_decoder(tmp_path, "llama") if family == "asked" else save_model(tmp_path, family)
    code = [sys.executable, "-c", _RANKS, str(model), family, *SLOW]
    assert subprocess.run(code, capture_output=True, text=True, check=True).stdout == "\n"
