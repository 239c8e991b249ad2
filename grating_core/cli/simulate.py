"""This is the command ``grating simulate``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from grating_core.cli.inputs import read_documents
from grating_core.cli.options import HUB, Takes
from grating_core.cli.output import err, show, write_json
from grating_core.cli.tables import plain_table
from grating_core.settings import ModelSettings


def simulate(
    settings: Annotated[ModelSettings, Takes(HUB)],
    text: str,
    memory: str,
    mlp_density: Sequence[float] = (0.83, 0.67, 0.57, 0.5),
    tokens: int = 512,
    activations: Path | None = None,
    shape: Path | None = None,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    inputs_preference: float = 0.9,
    products_preference: float = 0.3,
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
        memory: The memory for all weights, such as 2GB, or the share of the MLPs in memory, such as 50%.
        mlp_density: The share of the MLPs that a token uses. Several may be given.
        tokens: The number of tokens of the text to go through.
        activations: The file of recorded activations. The default is one in grating's cache.
        shape: The directory with the config.json of another model to simulate.
        dtype: The type of the weights.
        inputs_preference: The factor on an input whose column is not in memory, in cache-aware DIP.
        products_preference: The same factor for a product.
        machine: 'this', which is measured, 'phone', 'sata-ssd' or 'nvme'. Or give the next three options.
        disk_bandwidth: The rate of long reads, such as 500MB/s.
        disk_reads: The number of random reads of 4 KB a second, 8 at a time.
        memory_bandwidth: The rate at which the processor reads memory, such as 20GB/s.
        figure: The picture to draw perplexity against tokens a second into.
    """
    read = "\n\n".join(read_documents(text, plain="text"))
    with err.status("Loading ..."):
        import torch

        from grating_core.columns.cache import Preference
        from grating_core.lab.comparison import compare
        from grating_core.lab.machine import describe_machine, find_machine, parse_rate
        from grating_core.lab.simulator import Shape
        from grating_core.models.directory import find_model
        from grating_core.models.hub import Hub
        from grating_core.models.placement import choose_dtype

        hub = Hub(settings.revision, None, settings.cache_dir, settings.local_files_only)
        directory = find_model(str(settings.model), hub=hub, show_progress=True)
        weights, _ = choose_dtype(dtype, torch.device("cpu"))
        simulated = Shape.of(shape or directory, weights)
        bytes_of_weights = simulated.parse_memory(memory)
        preference = Preference(inputs_preference, products_preference)
        if disk_bandwidth is not None and disk_reads is not None and memory_bandwidth is not None:
            found = describe_machine(
                parse_rate(disk_bandwidth, "disk_bandwidth"),
                disk_reads,
                parse_rate(memory_bandwidth, "memory_bandwidth"),
            )
        elif any(given is not None for given in (disk_bandwidth, disk_reads, memory_bandwidth)):
            raise ValueError(
                "a machine is described by --disk-bandwidth, --disk-reads and --memory-bandwidth together"
            )
        else:
            found = find_machine(machine, weights)
    points = compare(
        directory,
        read,
        simulated,
        found,
        memory=bytes_of_weights,
        densities=mlp_density,
        tokens=tokens,
        preference=preference,
        activations=activations,
        perplexity=figure is not None,
        show_progress=True,
    )
    if figure is not None:
        from grating_core.lab.plots import plot_simulation

        plot_simulation(points, figure)
    if as_json:
        write_json({"memory": bytes_of_weights, "points": [asdict(point) for point in points]})
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
    show(
        f"{bytes_of_weights / 1e6:,.0f} of {simulated.total / 1e6:,.0f} MB of weights in memory; "
        f"buffers, keys and values aside.",
        style="dim",
    )
