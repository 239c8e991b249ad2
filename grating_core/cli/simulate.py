"""This is the command ``grating simulate``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from grating_core.arguments import check_bits, check_density, check_preference, parse_budget
from grating_core.cli.inputs import read_documents
from grating_core.cli.options import HUB, Takes
from grating_core.cli.output import err, show, tell, write_json
from grating_core.cli.tables import plain_table
from grating_core.settings import ModelSettings


def simulate(
    settings: Annotated[ModelSettings, Takes(HUB)],
    text: str,
    memory_budget: str,
    mlp_density: Sequence[float] = (0.83, 0.67, 0.57, 0.5),
    tokens: int = 512,
    activations: Path | None = None,
    shape: Path | None = None,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    bits: int | None = None,
    kv_bits: int | None = None,
    max_length: int | None = None,
    inputs_preference: float | None = None,
    products_preference: float | None = None,
    fit_preference: bool = False,
    machine: str = "this",
    disk_bandwidth: str | None = None,
    disk_reads: float | None = None,
    memory_bandwidth: str | None = None,
    figure: Path | None = None,
    as_json: bool = False,
) -> None:
    """Estimate how fast a decoder larger than memory generates: streamed, or pruned by dynamic input pruning.

    Args:
        text: The file of a real text, or of JSON Lines with texts, for the model to read.
        memory_budget: How much memory the model may take, in bytes or as a size such as 2GB.
        mlp_density: The share of the MLPs that a token uses. Several may be given.
        tokens: The number of tokens of the text to go through.
        activations: The file of recorded activations. The default is one in grating's cache.
        shape: The directory with the config.json of another model to simulate.
        dtype: The type of the states, and of the weights if they have no bits of their own.
        bits: The bits of each weight, 8 or 4.
        kv_bits: The bits of keys and values, 8.
        max_length: The most tokens of a prompt and its continuation together, which the budget pays for.
        inputs_preference: The factor on an input whose column is not in memory, in cache-aware DIP. The default is
            what was fitted to the model, or what grating takes for any model.
        products_preference: The same factor for a product.
        fit_preference: Whether to fit both factors to the model first, and to keep them. Loading the model then
            takes them by itself.
        machine: 'this', which is measured by running layers of the same widths, 'phone', 'sata-ssd' or 'nvme'.
            Or give the next three options.
        disk_bandwidth: The rate of long reads, such as 500MB/s.
        disk_reads: The number of random reads of 4 KB a second, 8 at a time.
        memory_bandwidth: The rate at which the processor reads memory, such as 20GB/s.
        figure: The picture to draw perplexity against tokens a second into.
    """
    check_bits("bits", bits, (8, 4), "the bits of a weight")
    check_bits("kv_bits", kv_bits, (8,), "the bits of keys and values")
    for density in mlp_density:
        check_density(density)
    for name, preference in (("inputs", inputs_preference), ("products", products_preference)):
        if preference is not None:
            check_preference(f"{name}_preference", preference)
    if fit_preference and shape is not None:
        raise ValueError(
            "--fit-preference is for the model itself, and --shape for another: leave one of them out"
        )
    budget = parse_budget(memory_budget)
    read = "\n\n".join(read_documents(text, plain="text"))
    with err.status("Loading ..."):
        import torch

        from grating_core.columns.preference import Preferences, read_fits
        from grating_core.lab.activations import WINDOW
        from grating_core.lab.comparison import compare
        from grating_core.lab.machine import Machine, find_machine, parse_rate
        from grating_core.lab.shape import Shape
        from grating_core.models.directory import find_model
        from grating_core.models.hub import Hub
        from grating_core.models.identity import fingerprint
        from grating_core.models.placement import choose_dtype

        described: Machine | None
        if disk_bandwidth is not None and disk_reads is not None and memory_bandwidth is not None:
            described = Machine(
                parse_rate(disk_bandwidth, "disk_bandwidth"),
                disk_reads,
                parse_rate(memory_bandwidth, "memory_bandwidth"),
            )
        elif any(given is not None for given in (disk_bandwidth, disk_reads, memory_bandwidth)):
            raise ValueError(
                "a machine is described by --disk-bandwidth, --disk-reads and --memory-bandwidth together"
            )
        else:
            described = None if machine == "this" else find_machine(machine)
        hub = Hub(settings.revision, None, settings.cache_dir, settings.local_files_only)
        directory = find_model(str(settings.model), hub=hub, show_progress=True)
        weights, _ = choose_dtype(dtype, torch.device("cpu"))
        simulated = Shape.of(shape or directory, weights, bits, max_length, kv_bits)
        plans = [form.plan(budget) for form in (simulated.dense, simulated.pruned)]
    if described is None:
        from grating_core.lab.probe import measure

        with err.status("Measuring this machine ..."):
            costs = measure(simulated, min(tokens, WINDOW) // 2)
    else:
        costs = described.costs(simulated)
    if fit_preference:
        from grating_core.lab.preference import fit_preferences

        share = plans[1].column_share
        for density, fitted in fit_preferences(
            directory, read, densities=mlp_density, share=share, tokens=tokens, show_progress=True
        ).items():
            tell(
                f"Density {density}: inputs_preference={fitted.preference.inputs}, products_preference="
                f"{fitted.preference.products} saves {fitted.saved:.0%} of what plain DIP reads; the error of the "
                f"MLPs' outputs rises from {fitted.plain_error:.2%} to {fitted.error:.2%}."
            )
    # A shape is that of another model, which this model's fits say nothing about.
    fits = [] if shape else read_fits(fingerprint(directory))
    points = compare(
        directory,
        read,
        simulated,
        costs,
        budget=budget,
        densities=mlp_density,
        tokens=tokens,
        preferences=Preferences(inputs_preference, products_preference, fits),
        activations=activations,
        perplexity=figure is not None,
        show_progress=True,
    )
    if figure is not None:
        from grating_core.lab.plots import plot_simulation

        plot_simulation(points, figure)
    if as_json:
        write_json({"memory_budget": budget, "points": [asdict(point) for point in points]})
        return
    table = plain_table("way", "density", "tokens/s", "MB a token", "hit rate", "perplexity")
    for point in points:
        table.add_row(
            point.estimate.way,
            f"{point.density:.2f}",
            f"{point.estimate.tokens_per_second:.2f}",
            f"{point.estimate.bytes_per_token / 1e6:,.1f}",
            "" if point.estimate.hit_rate is None else f"{point.estimate.hit_rate:.1%}",
            "" if point.perplexity is None else f"{point.perplexity:.2f}",
        )
    show(table)
    dense, pruned = plans
    show(
        f"Of {len(dense.sizes.layers)} layers {len(dense.resident)} stay in memory if they are dense; "
        f"if they are pruned, {pruned.column_share:.0%} of their columns.",
        style="dim",
    )
