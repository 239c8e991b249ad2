"""What dynamic input pruning costs: perplexity by density and way of pruning, and hit rates of its caches.

    .venv/bin/python -m benchmarks.dip --data ../shared/data/cisi --output figures
    .venv/bin/python -m benchmarks.dip --data ../shared/data/cisi --adapter recovered --output figures

The model is SmolLM2-135M-Instruct in float32. The text is the first 400 documents of a collection, of which the
first windows of 512 tokens are taken; a window's first token is not predicted. At equal density all ways use as
many of the MLPs' weights. "GLU" prunes the gated product alone, "gate" and "up" prune by one of its factors; none
of them prunes the input, so they cannot go below some density. "Recovered" is DIP with an adapter that was
distilled from the dense model.

The other tables have caches of half of the columns, in each layer and of each kind, whose least used columns give
way, over all tokens in their order. γ is what a magnitude counts whose column is not in memory, and has its own
value for inputs and for products; with 1 for both that is plain DIP.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

from benchmarks.shapes import find_or_write
from grating_core.columns.allocation import allocate
from grating_core.columns.cache import NO_PREFERENCE, Caching, Preference
from grating_core.columns.masks import Method, Shares, baseline_shares
from grating_core.lab.activations import load_decoder
from grating_core.lab.quality import Quality, cut_windows, evaluate
from grating_core.models.adapter import Adapter

DENSITIES = (0.83, 0.67, 0.57, 0.50)
PREFERENCES = (
    NO_PREFERENCE,
    Preference(1.0, 0.3),
    Preference(0.95, 0.3),
    Preference(0.9, 0.3),
    Preference(0.9, 0.2),
    Preference(0.2, 0.2),
)
CACHED = 0.5  # share of the columns in memory
RECOVERED = "recovered"
METHODS: tuple[Method, ...] = get_args(Method)
_DOCUMENTS = 400
_WINDOW = 512
_NAMES = {"dip": "DIP", "glu": "GLU", "gate": "gate", "up": "up", RECOVERED: "DIP, recovered"}
# Told apart by colour-blind readers, and without colour by their markers.
_STYLES = {"dip": ("#0072B2", "o"), "glu": ("#009E73", "^"), "gate": ("#E69F00", "s"), "up": ("#CC79A7", "D"),
           RECOVERED: ("#56B4E9", "v")}  # fmt: skip

console = Console(width=115)


@dataclass(frozen=True)
class Costs:
    """Perplexities of pruned models.

    Attributes:
        dense: Of the model as it is.
        pruned: By way of pruning and density.
    """

    dense: float
    pruned: Mapping[tuple[str, float], float]


def read_text(directory: Path) -> str:
    """The first documents of a collection, one after the other."""
    lines = (directory / "corpus.jsonl").read_text(encoding="utf-8").splitlines()[:_DOCUMENTS]
    return "\n\n".join(f"{document['title']}\n{document['text']}" for document in map(json.loads, lines))


@torch.no_grad()
def recover(model: Any, adapter: Path) -> None:
    """Merge an adapter into a model."""
    for name, change in Adapter(adapter).changes.items():
        change.add_to(model.get_parameter(name))


def find_shares(way: str, density: float, depth: int) -> tuple[Shares, ...] | None:
    """What each layer keeps; None where this way cannot go so low."""
    if way in ("dip", RECOVERED):
        return allocate(density, depth)
    shares = baseline_shares(way, density)  # type: ignore[arg-type]
    return None if shares is None else (shares,) * depth


def measure(model: Any, windows: Tensor, ways: Sequence[str]) -> dict[tuple[str, float], float]:
    """Perplexity of each way at each density that it can go to."""
    found = {}
    for way in ways:
        for density in DENSITIES:
            shares = find_shares(way, density, model.config.num_hidden_layers)
            if shares is not None:
                method: Any = "dip" if way == RECOVERED else way
                with console.status(f"{_NAMES[way]} at {density:.2f}"):
                    found[way, density] = evaluate(model, windows, shares=shares, method=method).perplexity
    return found


def measure_caches(model: Any, windows: Tensor, density: float) -> dict[Preference, Quality]:
    """What caches find and cost, by what they prefer; first without a preference."""
    shares = allocate(density, model.config.num_hidden_layers)
    found = {}
    for preference in PREFERENCES:
        with console.status(f"{preference} at {density:.2f}"):
            found[preference] = evaluate(model, windows, shares=shares, caching=Caching(CACHED, preference))
    return found


def costs_table(costs: Costs) -> str:
    """Perplexity, and by how much it is above the dense model's, in Markdown."""
    ways = list(dict.fromkeys(way for way, _ in costs.pruned))
    lines = [["density", *(_NAMES[way] for way in ways)], ["---:"] * (1 + len(ways))]
    lines.append(["1.00", *("–" if way == RECOVERED else f"{costs.dense:.2f}" for way in ways)])
    for density in DENSITIES:
        found = [costs.pruned.get((way, density)) for way in ways]
        cells = ["–" if cost is None else f"{cost:.2f} ({cost / costs.dense - 1:+.1%})" for cost in found]
        lines.append([f"{density:.2f}", *cells])
    return _markdown(lines)


def caches_table(caches: Mapping[Preference, Quality]) -> str:
    """Hit rates and perplexity by preference, in Markdown."""
    lines = [["γ inputs", "γ products", "hit rate", "inputs", "products", "MB a token", "perplexity", "cost"]]
    lines.append(["---:"] * len(lines[0]))
    for preference, quality in caches.items():
        traffic = quality.traffic
        assert traffic is not None  # there were caches
        rates = [traffic.hit_rate(), traffic.hit_rate("inputs"), traffic.hit_rate("products")]
        lines.append(
            [
                f"{preference.inputs:g}",
                f"{preference.products:g}",
                *(f"{rate:.1%}" for rate in rates),
                f"{traffic.bytes_per_token / 1e6:.1f}",
                f"{quality.perplexity:.2f}",
                f"{quality.perplexity / caches[NO_PREFERENCE].perplexity - 1:+.1%}",
            ]
        )
    return _markdown(lines)


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw_costs(costs: Costs, path: Path) -> None:
    """Perplexity against density."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for way in dict.fromkeys(way for way, _ in costs.pruned):
        colour, marker = _STYLES[way]
        curve = [(d, costs.pruned[way, d]) for d in DENSITIES if (way, d) in costs.pruned]
        if way != RECOVERED:  # nobody would merge the adapter into the dense model
            curve.insert(0, (1.0, costs.dense))
        axes.plot(*zip(*curve, strict=True), color=colour, marker=marker, label=_NAMES[way])
    axes.axhline(costs.dense, color="black", linestyle=":", label="dense")
    axes.set(xlabel="share of the MLPs' weights that a token uses", ylabel="perplexity", yscale="log")
    _plain_numbers(axes)
    axes.set_ylim(0.9 * costs.dense, 10 * costs.dense)  # what is beyond says no more than that it is useless
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=150)


def _plain_numbers(axes: Any) -> None:
    """Write perplexities as numbers, not as powers of ten."""
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")


def draw_caches(caches: Mapping[float, Mapping[Preference, Quality]], path: Path) -> None:
    """Perplexity against hit rate over preferences, by density."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for (density, found), (colour, marker) in zip(caches.items(), _STYLES.values(), strict=False):
        for preference, quality in found.items():
            assert quality.traffic is not None
            point = quality.traffic.hit_rate(), quality.perplexity
            label = f"density {density:.2f}" if preference == NO_PREFERENCE else None
            axes.plot(*point, color=colour, marker=marker, linestyle="", label=label)
            name = f"{preference.inputs:g} / {preference.products:g}"
            axes.annotate(name, point, (4, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="hit rate", ylabel="perplexity", yscale="log")
    _plain_numbers(axes)
    axes.set_title("caches of half of the columns, by γ for inputs / products")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=150)


def main(
    data: Annotated[Path, typer.Option(help="A collection in BEIR layout; CISI for the figures of the README.")],
    model: Annotated[str, typer.Option(help="A decoder: smollm2-135m, hub id or directory.")] = "smollm2-135m",
    windows: Annotated[int, typer.Option(help="How many windows of 512 tokens.")] = 16,
    cached_density: Annotated[
        list[float], typer.Option(help="Density at which caches are measured; may be given several times.")
    ] = [0.67, 0.5],  # noqa: B006 - typer copies it
    adapter: Annotated[Path | None, typer.Option(help="One that was distilled for DIP; adds a column.")] = None,
    output: Annotated[Path | None, typer.Option(help="A directory for the figures.")] = None,
) -> None:
    """Measure, print the tables, draw the figures."""
    loaded, tokenizer = load_decoder(find_or_write(model))
    ids = cut_windows(tokenizer, read_text(data), _WINDOW, windows)
    dense = evaluate(loaded, ids)
    pruned = measure(loaded, ids, METHODS)
    caches = {density: measure_caches(loaded, ids, density) for density in cached_density}
    if adapter is not None:  # at last: it changes the model
        recover(loaded, adapter)
        pruned |= measure(loaded, ids, [RECOVERED])
    costs = Costs(dense.perplexity, pruned)
    print(f"Perplexity of {model} on {dense.tokens:,} tokens of {data.name}:\n\n{costs_table(costs)}\n")
    for density, found in caches.items():
        print(f"Caches of half of the columns, density {density:.2f}:\n\n{caches_table(found)}\n")
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        draw_costs(costs, output / "dip_density.png")
        draw_caches(caches, output / "dip_caches.png")
        console.print(f"The figures are in {output}.")


if __name__ == "__main__":
    typer.run(main)
