"""Renders the pages and figures of the documentation from the files of results.

    .venv/bin/python -m benchmarks.render

Each page of ``docs/benchmarks`` has a template in ``benchmarks/pages``, with the words. Tables, and all figures in
the words, come from ``benchmarks/results``, so that no figure outlives its measurement. Other documents mark a
line that quotes figures with ``<!-- figure: NAME -->``; :func:`wrong_figures` says which of its numbers nobody
measured.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import typer

from benchmarks.figures import draw_deadline, draw_gammas, draw_generation, draw_memory, draw_promise, draw_pruning
from benchmarks.report import ROOT, Result, read_results

PAGES = Path(__file__).parent / "pages"
DOCS = ROOT / "docs"
FIGURES: dict[str, tuple[str, Callable[[Result, Path], None]]] = {
    "memory.png": ("memory-m3", draw_memory),
    "pruning.png": ("pruning", draw_pruning),
    "promise.png": ("promise", draw_promise),
    "gammas.png": ("pruning-layers", draw_gammas),
    "deadline.png": ("deadline", draw_deadline),
    "generation.png": ("generation-speed", draw_generation),
}

Results = Mapping[str, Result]

_MARK = re.compile(r"<!-- figure: ([\w-]+) -->")
_NUMBER = re.compile(r"(?<![\w.,])\d[\d,]*(?:\.\d+)?(?![\w.,]*\d)")
_CODE = re.compile(r"`[^`]*`|\([^)]*\)")  # code, and what a link leads to


def shown(value: object, form: str = "") -> str:
    """Return a value as a table shows it; None, which is nothing, as an empty cell."""
    return "" if value is None else format(value, form)


def provenance(result: Result) -> str:
    """Return the line under a table: when, of what, where and how it was measured."""
    hardware = result.hardware
    rates = (f"{rate:,.0f} GFLOP/s in {dtype}" for dtype, rate in hardware["gflops"].items())
    missing = [name for name, version in result.versions.items() if version is None]
    parts = [
        result.date,
        f"commit {result.commit}" + (" with changes" if result.dirty else ""),
        f"{hardware['processor']} ({', '.join(hardware['instructions'])}; {', '.join(rates)}), "
        f"{hardware['cores']} cores, {hardware['threads']} threads, {hardware['memory_gb']:.0f} GB",
        *([f"kernels: {hardware['kernels']}"] if "kernels" in hardware else []),
        ", ".join(f"{name} {version}" for name, version in result.versions.items() if version is not None),
        *([f"not installed: {', '.join(missing)}"] if missing else []),
        f"{result.rounds} {'round' if result.rounds == 1 else 'rounds'}",
        f"`{result.command}`",
    ]
    return f"<small>{'; '.join(parts)}</small>"


def table(result: Result, columns: Mapping[str, tuple[str, str]], **wanted: object) -> str:
    """Render some rows of a result in Markdown, as :func:`lines` does, and where they come from."""
    return f"{lines(result, columns, **wanted)}\n\n{provenance(result)}"


def lines(result: Result, columns: Mapping[str, tuple[str, str]], **wanted: object) -> str:
    """Render some rows of a result in Markdown.

    Args:
        result: Has the rows.
        columns: For each heading the name of the figure, and how it is formatted.
        wanted: Values that a row must have; a list says which are allowed.
    """
    rows = [row for row in result.rows if all(_allowed(row[name], value) for name, value in wanted.items())]
    cells = [
        list(columns),
        ["---", *["---:"] * (len(columns) - 1)],
        *([shown(row[figure], form) for figure, form in columns.values()] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _allowed(value: object, wanted: object) -> bool:
    return value in wanted if isinstance(wanted, list) else value == wanted


def render_page(name: str, results: Results) -> str:
    """Render a page of ``docs/benchmarks``.

    Args:
        name: Name of the template, such as ``latency.md``.
        results: All results by their names. A part of the page whose result is missing says so.
    """
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    known: dict[str, Any] = {
        "results": results,
        "table": table,
        "lines": lines,
        "provenance": provenance,
        "shown": shown,
    }
    return templates.get_template(name).render(known)


def page_names() -> list[str]:
    """Return the names of the templates, which are those of the pages."""
    return sorted(path.name for path in PAGES.glob("*.md"))


# Figures that other documents quote.


def _application(results: Results) -> list[float]:
    rows = [row for row in results["applications"].rows if row["application"].startswith("RAG in LangChain")]
    return [row["seconds"] for row in rows] + [row["quality"] for row in rows]


def _promise(results: Results) -> list[float]:
    (row,) = (
        row
        for row in results["promise"].rows
        if (row["corpus"], row["candidates"], row["top_k"], row["target"]) == ("mean", 20, 5, 0.98)
    )
    return [5, 20, row["corpora"], 100 * row["compute_share"], 100 * row["kept"]]


def _pruning(results: Results) -> list[float]:
    result = results["pruning"]
    row = result.row(collection="mean", policy="lens", value=0.98, scores="exact", top_k=5)
    return [100 * row["compute_share"], 100 * row["agreement"], row["top_k"], result.setting["candidates"]]


def _memory(results: Results) -> list[float]:
    result = results["memory-m3"]
    figures = [row[name] for row in result.rows for name in ("peak_mb", "peak_private_mb", "budget_mb", "seconds")]
    numbers = [result.setting["candidates"], result.setting["tokens"], result.setting["weights_mb"] / 1000, 4]
    return [figure for figure in (*figures, *numbers) if figure is not None]


def _latency(results: Results) -> list[float]:
    """The means over the collections: seconds and milliseconds, ratios, and shares in percent."""
    result = results["latency"]
    rows = [row for row in result.rows if row["case"] == "mean"]
    figures = [row[name] for row in rows for name in ("times_fastest", "times_faithful", "times_usual")]
    kept = [100 * row[name] for row in rows for name in ("agreement_1", "agreement_5", "agreement_10")]
    numbers = [result.setting["candidates"], result.setting["top_k"], result.hardware["cores"]]
    return [*figures, *kept, *(1000 * row["seconds"] for row in rows), *(row["seconds"] for row in rows), *numbers]


QUOTED: dict[str, tuple[str, Callable[[Results], list[float]]]] = {
    "latency": ("latency", _latency),
    "application": ("applications", _application),
    "pruning": ("pruning", _pruning),
    "promise": ("promise", _promise),
    "memory": ("memory-m3", _memory),
}
"""For each name in a mark the result, and what gives the figures of it that a line may quote."""


def wrong_figures(text: str, results: Results) -> list[str]:
    """Return the marked lines with a number that is not among the measured figures, each with that number.

    A number is right if a figure, rounded to as many decimals, is the same. Numbers in code do not count.

    Args:
        text: A document in Markdown.
        results: All results by their names.
    """
    wrong = []
    for line in text.splitlines():
        for name in _MARK.findall(line):
            figures = QUOTED[name][1](results)
            for number in _NUMBER.findall(_CODE.sub("", _MARK.sub("", line))):
                decimals = len(number.partition(".")[2])
                if number.replace(",", "") not in {f"{figure:.{decimals}f}" for figure in figures}:
                    wrong.append(f"{number}: {line}")
    return wrong


def main() -> None:
    """Render all pages and draw all figures."""
    results = read_results()
    (DOCS / "benchmarks").mkdir(exist_ok=True)
    for name in page_names():
        (DOCS / "benchmarks" / name).write_text(render_page(name, results), encoding="utf-8")
    for name, (source, draw) in FIGURES.items():
        if source in results:
            draw(results[source], DOCS / name)


if __name__ == "__main__":
    typer.run(main)
