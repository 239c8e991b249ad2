"""The notebooks run, and as they are committed they can be read without running them."""

import re
from pathlib import Path

import nbformat
import pytest

from scripts.run_notebooks import NOTEBOOKS, execute

PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
READABLE = ("text/plain", "text/html", "text/markdown")
ABSOLUTE_PATH = re.compile(r"(?<![\w.~<:/])/(?:[\w.-]+/)+[\w.-]+|\b[A-Z]:\\\w+")

# The quickest; the others take another three minutes.
QUICK = ("llamaindex_rag",)

each = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def test_there_are_notebooks() -> None:
    assert PATHS


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=() if path.stem in QUICK else pytest.mark.slow) for path in PATHS],
)
def test_runs(path: Path) -> None:
    execute(path)


@each
def test_is_committed_with_outputs_for_readers(path: Path) -> None:
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    for output in outputs:
        for text in (output.get("text", ""), *(output.get("data", {}).get(kind, "") for kind in READABLE)):
            assert not ABSOLUTE_PATH.search(text)
    assert path.stat().st_size < 500_000
