"""Execute the notebooks, or those that are named, and save them with what they print and draw.

This is how they are committed: ``python scripts/run_notebooks.py [notebooks/langchain_rag.ipynb …]``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbformat import NotebookNode
from traitlets import default

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
CELL_SECONDS = 300  # only so that a hanging one ends
# No hub, no progress bars, and no advice to install widgets for them.
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore:IProgress not found",
}


class ThisInterpreter(AsyncKernelManager):
    """Starts kernels of the interpreter that runs this, whatever kernels are installed for the user."""

    @default("kernel_spec_manager")
    def _only_ipykernels_own(self) -> KernelSpecManager:
        return KernelSpecManager(kernel_dirs=[])


def execute(path: Path) -> NotebookNode:
    """Run a notebook from start to end in its own folder, without the hub and without progress bars.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell failed; the message has its traceback.
    """
    client = NotebookClient(
        nbformat.read(path, as_version=4),
        kernel_name="python3",
        kernel_manager_class=ThisInterpreter,
        timeout=CELL_SECONDS,
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    )
    return client.execute(env={**os.environ, **SETTINGS})


def save(notebook: NotebookNode, path: Path) -> None:
    """Write a notebook with its outputs and without the versions it ran with."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for path in [Path(name).resolve() for name in sys.argv[1:]] or sorted(NOTEBOOKS.glob("*.ipynb")):
        print(path.name, file=sys.stderr)
        save(execute(path), path)
