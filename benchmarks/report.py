"""The files of results: what was measured, with all that it takes to measure it again.

Every table of the documentation stands in ``benchmarks/results/NAME.json``. A benchmark writes the file, and
:mod:`benchmarks.render` makes the pages of it.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import psutil
import torch
import typer

from grating_core.files.writing import replacing
from grating_core.kernels.choice import kernels

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "numpy")
# What the measuring itself writes does not make the tree dirty.
_WRITTEN = (":!benchmarks/results", ":!docs")
# Of a processor's abilities, those that decide how fast it multiplies matrices.
_INSTRUCTIONS = {
    *("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16", "amx_int8"),
    *("asimd", "asimddp", "sve", "bf16", "i8mm"),
}

Output = Annotated[Path, typer.Option(help="The directory that the file of results goes to.")]
"""The option of every benchmark that says where its results go."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """The content of one file of results.

    Attributes:
        name: Name of the file, without its ending.
        date: Day of the measurement, in UTC, as ``2026-11-26``.
        commit: First 12 digits of the commit that was measured.
        dirty: Whether files differed from that commit.
        hardware: Processor, cores, threads, instructions, GFLOP/s of a matrix product by dtype, memory in GB, and
            the level of grating's kernels, or "torch" and why. Files from before there were kernels lack the last.
        versions: Version of Python and of each package; None for one that is not installed.
        command: The command that measured it. A directory outside the repository is written by its last part.
        rounds: How often each request was timed.
        setting: What else the rows have in common.
        rows: One for each line of the table, with units in the names.
    """

    name: str
    date: str
    commit: str
    dirty: bool
    hardware: dict[str, Any]
    versions: dict[str, str | None]
    command: str
    rounds: int
    setting: dict[str, Any]
    rows: list[Row]

    def row(self, **wanted: object) -> Row:
        """Return the one row that has these values.

        Raises:
            ValueError: No row has them, or several have.
        """
        (found,) = (row for row in self.rows if all(row.get(name) == value for name, value in wanted.items()))
        return found


def write_result(
    output: Path,
    name: str,
    rows: Sequence[Row],
    *,
    rounds: int,
    setting: Row | None = None,
    packages: Sequence[str] = (),
) -> None:
    """Write a file of results, whole or not at all.

    Args:
        output: The directory that the file goes to.
        name: Name of the file, without its ending.
        rows: See :class:`Result`.
        rounds: See :class:`Result`.
        setting: See :class:`Result`.
        packages: The peers' packages, whose versions are noted as well.
    """
    commit, dirty = _commit()
    versions: dict[str, str | None] = {"python": platform.python_version()}
    result = Result(
        name=name,
        date=datetime.now(UTC).date().isoformat(),
        commit=commit,
        dirty=dirty,
        hardware=_hardware(),
        versions=versions | {package: installed(package) for package in (*PACKAGES, *packages)},
        command=_command(),
        rounds=rounds,
        setting=setting or {},
        rows=list(rows),
    )
    output.mkdir(parents=True, exist_ok=True)
    facts = _rounded(asdict(result))
    lines = ",\n  ".join(_json(row) for row in facts.pop("rows"))
    text = f'{_json(facts, indent=1)[:-2]},\n "rows": [\n  {lines}\n ]\n}}\n'
    with replacing(output / f"{name}.json") as file:
        file.write(text.encode())


def read_result(path: Path) -> Result:
    """Read a file of results; a field that is missing or unknown is a ``TypeError``."""
    return Result(**json.loads(path.read_text(encoding="utf-8")))


def read_results(directory: Path = RESULTS) -> dict[str, Result]:
    """Read all files of results, by their names."""
    return {path.stem: read_result(path) for path in sorted(directory.glob("*.json"))}


def installed(package: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> tuple[str, bool]:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *_WRITTEN)
    return git("rev-parse", "--short=12", "HEAD").strip(), bool(changed)


def _command() -> str:
    specification = sys.modules["__main__"].__spec__
    module = specification.name if specification else Path(sys.argv[0]).stem
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["python", "-m", module, *words])


def _hardware() -> Row:
    known = Path("/proc/cpuinfo")
    facts = known.read_text(encoding="utf-8").splitlines() if known.is_file() else []
    lines = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in facts if ":" in line]))
    flags = {*lines.get("flags", "").split(), *lines.get("Features", "").split()}
    return {
        "processor": lines.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": sorted(flags & _INSTRUCTIONS),
        "gflops": {str(dtype).split(".")[1]: _product_rate(dtype) for dtype in (torch.float32, torch.bfloat16)},
        "memory_gb": psutil.virtual_memory().total / 1e9,
        "kernels": kernels().level or f"torch ({kernels().reason.removesuffix('.')})",
    }


def _product_rate(dtype: torch.dtype) -> float:
    """Measure the GFLOP/s of a large matrix product: how much of a dtype's promise this machine keeps."""
    size = 2048
    left, right = torch.randn(2, size, size).to(dtype).unbind()
    taken = []
    for _ in range(7):
        started = perf_counter()
        left @ right
        taken.append(perf_counter() - started)
    return 2 * size**3 / median(taken) / 1e9


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)


def _rounded(value: Any) -> Any:
    """Return the value with all its numbers in four significant digits, which is more than can be repeated."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    if isinstance(value, float) and isfinite(value):
        return float(f"{value:.4g}") if abs(value) < 1000 else round(value)
    return value
