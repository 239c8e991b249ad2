"""What dynamic input pruning costs: perplexity by density and way of pruning, by caches, and by bits of columns.

    .venv/bin/python -m benchmarks.perplexity methods --data DIRECTORY
    .venv/bin/python -m benchmarks.perplexity caches --data DIRECTORY
    .venv/bin/python -m benchmarks.perplexity columns --data DIRECTORY --adapter DIRECTORY

The directory holds the collections cisi and cranfield. The model is SmolLM2-135M-Instruct in float32. A seed draws
documents of both collections, which are cut into windows of 512 tokens; a window's first token is not predicted.

At equal density all ways use as many of the MLPs' weights. "GLU" prunes the gated product alone, "gate" and "up"
prune by one of its factors; none of them prunes the input, so they cannot go below some density.

Caches hold half of the columns, in each layer and of each kind: those that random tokens used most. γ is what a
magnitude counts whose column is not in memory, and has its own value for inputs and for products; 1 prefers none.
All columns in memory are used, and so are those that a long read passes.

An adapter recovers what a density of 0.5 costs. It must not have learnt from the collections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
import typer
from rich.progress import track
from torch import Tensor, nn

from benchmarks.quantised import count_tokens, read_windows, summary
from benchmarks.report import RESULTS, Output, Row, write_result
from benchmarks.shapes import find_or_write
from benchmarks.worker import progress
from grating_core.columns.allocation import allocate
from grating_core.columns.cache import NO_PREFERENCE, Caching, Preference
from grating_core.columns.disk import Disk
from grating_core.columns.masks import Shares, keep_largest
from grating_core.columns.order import input_errors
from grating_core.columns.preference import USUAL
from grating_core.kernels.columns import RowFormat, pack_columns, unpack_columns
from grating_core.lab.activations import Activations, record
from grating_core.lab.decoders import load_decoder
from grating_core.lab.masked import MaskedMlp
from grating_core.lab.quality import cached_mlps, evaluate
from grating_core.lab.simulator import find_order
from grating_core.models.adapter import Adapter

DENSITIES = (0.83, 0.67, 0.57, 0.50)
CACHED_DENSITIES = (0.67, 0.50)
PREFERENCES = (NO_PREFERENCE, Preference(1.0, 0.3), USUAL, Preference(0.2, 0.2))
CACHED = 0.5  # share of the columns in memory
RECOVERED = 0.5  # density of the adapter
Method = Literal["dip", "glu", "gate", "up"]
METHODS: tuple[Method, ...] = get_args(Method)
Part = Literal["methods", "caches", "columns"]


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


def measure_methods(model: Any, texts: Sequence[Tensor]) -> list[Row]:
    """Make a row of each way at each density that it can go to, after one of the dense model."""
    cases = [(method, density) for method in METHODS for density in DENSITIES]
    dense = _perplexities(model, texts)
    rows: list[Row] = [{"method": "dense", "density": 1.0, **summary(dense, dense)}]
    for method, density in track(cases, "pruning", console=progress):
        if shares := find_shares(method, density, model.config.num_hidden_layers):
            found = _perplexities(model, texts, shares=shares, make=make_mlp(method))
            rows.append({"method": method, "density": density, **summary(found, dense)})
    return rows


def measure_caches(model: Any, texts: Sequence[Tensor]) -> list[Row]:
    """Make a row of each density and preference; first without a preference."""
    rows = []
    dense = _perplexities(model, texts)
    cases = [(density, preference) for density in CACHED_DENSITIES for preference in PREFERENCES]
    seen = record_sample(model)
    orders = [tuple(map(find_order, layer)) for layer in zip(seen.inputs, seen.products, strict=True)]
    for density, preference in track(cases, "caching", console=progress):
        shares = allocate(density, model.config.num_hidden_layers)
        caching = Caching(CACHED, preference)
        found = [
            evaluate(model, windows, shares=shares, make=cached_mlps(caching, orders, Disk().gaps))
            for windows in texts
        ]
        traffics = [quality.traffic for quality in found if quality.traffic is not None]
        rows.append(
            {
                "density": density,
                "gamma_inputs": preference.inputs,
                "gamma_products": preference.products,
                "hit_rate": fmean(traffic.hit_rate() for traffic in traffics),
                "read_mb_per_token": fmean(traffic.bytes_per_token for traffic in traffics) / 1e6,
                **summary([quality.perplexity for quality in found], dense),
            }
        )
    return rows


def record_sample(model: Any) -> Activations:
    """Record random tokens, which tell the order of columns and which of their errors count."""
    sample = torch.randint(model.config.vocab_size, (4, 128), generator=torch.Generator().manual_seed(0))
    return record(model, list(sample))


def measure_columns(model: Any, texts: Sequence[Tensor], adapter: Path | None) -> list[Row]:
    """Make a row of each density and number of bits, and of a density of 0.5 with an adapter.

    All are compared with the dense model, and those with bits with the same density without as well.
    """
    depth = model.config.num_hidden_layers
    dense = _perplexities(model, texts)
    rows: list[Row] = []

    def add(density: float, bits: int | None, base: Sequence[float] | None, adapter: bool = False) -> list[float]:
        found = _perplexities(model, texts, shares=allocate(density, depth))
        rows.append({"density": density, "bits": bits or 16, "adapter": "yes" if adapter else "no"})
        rows[-1] |= {**summary(found, dense), "cost_of_bits": base and summary(found, base)["cost"]}
        return found

    for density in CACHED_DENSITIES:
        plain = add(density, None, None)
        for bits in (8, 4):
            with rounded(model, bits):
                add(density, bits, plain)
    if adapter is not None:
        add_adapter(model, adapter)
        plain = add(RECOVERED, None, None, adapter=True)
        for bits in (8, 4):
            with rounded(model, bits):
                add(RECOVERED, bits, plain, adapter=True)
    return rows


@contextmanager
def rounded(model: Any, bits: int) -> Iterator[None]:
    """Let the MLPs' weights be what their columns are in a companion file of so many bits."""
    layers = [(layer.mlp.up_proj, layer.mlp.gate_proj, layer.mlp.down_proj) for layer in model.model.layers]
    before = [[module.weight.clone() for module in modules] for modules in layers]
    products = record_sample(model).products
    with torch.no_grad():
        for (up, gate, down), seen in zip(layers, products, strict=True):
            squares = torch.from_numpy(np.square(seen.astype(np.float32)).mean(0))
            round_columns((up.weight, gate.weight), bits, input_errors({"down": squares}))
            round_columns((down.weight,), bits, None)
        try:
            yield
        finally:
            for modules, whole in zip(layers, before, strict=True):
                for module, weight in zip(modules, whole, strict=True):
                    module.weight.copy_(weight)


def round_columns(matrices: Sequence[Tensor], bits: int, errors: Tensor | None) -> None:
    """Let the columns of matrices, which have as many rows each, be those of a table of so many bits.

    Args:
        matrices: The matrices, whose columns of the same number are one row of the table. They are changed.
        bits: 8 or 4.
        errors: How much squared errors of a row's entries count; None for the same of all.
    """
    columns = torch.cat([matrix.T for matrix in matrices], 1)
    form = RowFormat(columns.shape[1], columns.dtype, bits)
    table = torch.from_numpy(pack_columns(columns, form, errors))
    unpack_columns(form, table.flatten(), np.arange(len(table)) * form.row_bytes, columns)
    for matrix, part in zip(matrices, columns.T.chunk(len(matrices)), strict=True):
        matrix.copy_(part)


def add_adapter(model: Any, directory: Path) -> None:
    """Add the changes of an adapter to a model's weights."""
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, change in Adapter(directory).changes.items():
            change.add_to(weights[name])


def _perplexities(model: Any, texts: Sequence[Tensor], **settings: Any) -> list[float]:
    """Return the perplexity of each seed's text."""
    return [evaluate(model, windows, **settings).perplexity for windows in texts]


def main(
    part: Annotated[Part, typer.Argument(help="What is measured.")],
    data: Annotated[Path, typer.Option(help="Holds the collections cisi and cranfield, in BEIR layout.")],
    model: Annotated[str, typer.Option(help="A decoder: smollm2-135m, hub id or directory.")] = "smollm2-135m",
    adapter: Annotated[Path | None, typer.Option(help="Made by grating distill, for a density of 0.5.")] = None,
    windows: Annotated[int, typer.Option(help="Windows of 512 tokens for each of the three seeds.")] = 14,
    output: Output = RESULTS,
) -> None:
    """Measure, and write generation-methods.json, generation-caches.json or generation-columns.json."""
    loaded, tokenizer = load_decoder(find_or_write(model))
    texts = read_windows(data, tokenizer, windows)
    if part == "methods":
        rows = measure_methods(loaded, texts)
    elif part == "caches":
        rows = measure_caches(loaded, texts)
    else:
        rows = measure_columns(loaded, texts, adapter)
    setting = {"model": model, "tokens": count_tokens(texts), "seeds": len(texts), "cached_share": CACHED}
    write_result(output, f"generation-{part}", rows, rounds=1, setting=setting)


if __name__ == "__main__":
    typer.run(main)
