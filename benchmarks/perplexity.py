"""What dynamic input pruning costs: perplexity by density and way of pruning, and hit rates of its caches.

    .venv/bin/python -m benchmarks.perplexity --data DIRECTORY

The directory holds the collection cisi. The model is SmolLM2-135M-Instruct in float32. The text is the first 400
documents, of which the first windows of 512 tokens are taken; a window's first token is not predicted. At equal
density all ways use as many of the MLPs' weights. "GLU" prunes the gated product alone, "gate" and "up" prune by
one of its factors; none of them prunes the input, so they cannot go below some density.

The other rows have caches of half of the columns, in each layer and of each kind, whose least used columns give
way, over all tokens in their order. γ is what a magnitude counts whose column is not in memory, and has its own
value for inputs and for products; with 1 for both that is plain DIP.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer
from rich.progress import track
from torch import Tensor, nn

from benchmarks.report import RESULTS, Output, Row, write_result
from benchmarks.shapes import find_or_write
from benchmarks.worker import progress
from grating_core.columns.allocation import allocate
from grating_core.columns.cache import NO_PREFERENCE, Caching, Preference
from grating_core.columns.install import PREFERENCE
from grating_core.columns.masks import Shares, keep_largest
from grating_core.lab.decoders import load_decoder
from grating_core.lab.masked import MaskedMlp
from grating_core.lab.quality import CachedMlp, cut_windows, evaluate

DENSITIES = (0.83, 0.67, 0.57, 0.50)
CACHED_DENSITIES = (0.67, 0.50)
PREFERENCES = (NO_PREFERENCE, Preference(1.0, 0.3), PREFERENCE, Preference(0.2, 0.2))
CACHED = 0.5  # share of the columns in memory
Method = Literal["dip", "glu", "gate", "up"]
METHODS: tuple[Method, ...] = get_args(Method)
_DOCUMENTS = 400
_WINDOW = 512


def read_text(directory: Path) -> str:
    """Read the first documents of a collection, one after the other."""
    lines = (directory / "corpus.jsonl").read_text(encoding="utf-8").splitlines()[:_DOCUMENTS]
    return "\n\n".join(f"{document['title']}\n{document['text']}" for document in map(json.loads, lines))


class BaselineMlp(MaskedMlp):
    """A gated MLP that keeps all inputs and prunes its products by another rule than DIP's.

    ``"glu"`` keeps the largest gated products, ``"gate"`` the columns where act(W_g x) is largest, ``"up"`` those
    where W_u x is.
    """

    def __init__(self, mlp: Any, shares: Shares, method: Method) -> None:
        super().__init__(mlp, shares)
        self.method = method

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the MLP's output ``[…, D]`` for its input of that shape."""
        mlp, products = self.mlp, self.shares.products
        gate, up = mlp.act_fn(mlp.gate_proj(hidden)), mlp.up_proj(hidden)
        if self.method == "gate":
            gate = keep_largest(gate, products)
        elif self.method == "up":
            up = keep_largest(up, products)
        product = gate * up
        if self.method == "glu":
            product = keep_largest(product, products)
        output: Tensor = mlp.down_proj(product)
        return output


def baseline_shares(method: Method, density: float) -> Shares | None:
    """Say what a method other than DIP keeps at a density, or None where it cannot go so low.

    GLU pruning needs W_u and W_g whole. Pruning by the gate needs W_g whole and of the two others what is kept; by
    the up projection likewise.
    """
    products = 3 * density - 2 if method == "glu" else (3 * density - 1) / 2
    return Shares(1.0, products) if products > 0 else None


def make_mlp(method: Method) -> Callable[[Any, Shares], nn.Module]:
    """Return what makes the stand-in for an MLP."""
    return MaskedMlp if method == "dip" else partial(BaselineMlp, method=method)


def find_shares(method: Method, density: float, depth: int) -> tuple[Shares, ...] | None:
    """Say what each layer keeps; None where this way cannot go so low."""
    if method == "dip":
        return allocate(density, depth)
    shares = baseline_shares(method, density)
    return None if shares is None else (shares,) * depth


def measure_methods(model: Any, windows: Any) -> list[Row]:
    """Make a row of each way at each density that it can go to, after one of the dense model."""
    cases = [(method, density) for method in METHODS for density in DENSITIES]
    rows: list[Row] = [{"method": "dense", "density": 1.0, "perplexity": evaluate(model, windows).perplexity}]
    for method, density in track(cases, "pruning", console=progress):
        if shares := find_shares(method, density, model.config.num_hidden_layers):
            found = evaluate(model, windows, shares=shares, make=make_mlp(method))
            rows.append({"method": method, "density": density, "perplexity": found.perplexity})
    return rows


def measure_caches(model: Any, windows: Any) -> list[Row]:
    """Make a row of each density and preference; first without a preference."""
    rows = []
    cases = [(density, preference) for density in CACHED_DENSITIES for preference in PREFERENCES]
    for density, preference in track(cases, "caching", console=progress):
        shares = allocate(density, model.config.num_hidden_layers)
        make = partial(CachedMlp, caching=Caching(CACHED, preference))
        quality = evaluate(model, windows, shares=shares, make=make)
        assert quality.traffic is not None  # there were caches
        rows.append(
            {
                "density": density,
                "gamma_inputs": preference.inputs,
                "gamma_products": preference.products,
                "hit_rate": quality.traffic.hit_rate(),
                "read_mb_per_token": quality.traffic.bytes_per_token / 1e6,
                "perplexity": quality.perplexity,
            }
        )
    return rows


def main(
    data: Annotated[Path, typer.Option(help="Holds the collection cisi, in BEIR layout.")],
    model: Annotated[str, typer.Option(help="A decoder: smollm2-135m, hub id or directory.")] = "smollm2-135m",
    windows: Annotated[int, typer.Option(help="How many windows of 512 tokens.")] = 4,
    output: Output = RESULTS,
) -> None:
    """Measure, and write generation-perplexity.json and generation-caches.json."""
    loaded, tokenizer = load_decoder(find_or_write(model))
    ids = cut_windows(tokenizer, read_text(data / "cisi"), _WINDOW, windows)
    setting = {"model": model, "tokens": windows * (_WINDOW - 1), "cached_share": CACHED}
    for name, measure in (("perplexity", measure_methods), ("caches", measure_caches)):
        write_result(output, f"generation-{name}", measure(loaded, ids), rounds=1, setting=setting)


if __name__ == "__main__":
    typer.run(main)
