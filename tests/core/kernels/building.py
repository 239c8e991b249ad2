"""The compiled kernels, built anew from the repository's sources for a test."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SOURCES = ROOT / "kernels"
TOOLS = all(map(shutil.which, ("cmake", "c++")))

needs_compiler = pytest.mark.skipif(not TOOLS, reason="cmake or c++ is missing")


def built(folder: Path, *options: str) -> Path:
    """Build the module with options of CMake, and return the folder of the build."""
    build = folder / "build"
    run("cmake", "-S", str(SOURCES), "-B", str(build), *options)
    run("cmake", "--build", str(build), "--parallel", "2")
    return build


def packaged(folder: Path, module: Path) -> Path:
    """Put a module into a package ``grating_kernels``, and return the folder to import it from."""
    package = folder / "site" / "grating_kernels"
    package.mkdir(parents=True)
    shutil.copy(SOURCES / "grating_kernels" / "__init__.py", package)
    shutil.copy(module, package)
    return package.parent


def run(*command: str) -> str:
    """Run a command that must succeed, and return what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stdout + done.stderr
    return done.stdout


def python(site: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the package of ``site``, and return what came of it."""
    path = os.pathsep.join((str(site), str(ROOT), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        (sys.executable, *arguments), cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
