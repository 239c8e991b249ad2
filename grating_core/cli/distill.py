"""``grating distill``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grating_core.cli.inputs import read_documents
from grating_core.cli.options import HUB, InputOptions, Takes
from grating_core.cli.output import err, show, tell
from grating_core.cli.tables import plain_table
from grating_core.settings import ModelSettings


def distill(
    settings: Annotated[ModelSettings, Takes(("device", "dtype", *HUB))],
    text: Annotated[
        list[Path], typer.Option(help="A file of texts, of the kind the model will read. Several may be given.")
    ],
    output: Annotated[
        Path, typer.Option(help="A new directory for the adapter, or the one that a stopped run left.")
    ],
    how_stored: InputOptions,
    mlp_density: Annotated[
        float, typer.Option(help="The share of the MLPs' weights that a token will use.")
    ] = 0.5,
    rank: Annotated[int, typer.Option(help="The rank of the adapter's changes.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="The highest learning rate, after the warm-up.")] = 1e-3,
    steps: Annotated[int, typer.Option(help="How often the adapter is changed.")] = 400,
    tokens_per_step: Annotated[
        int, typer.Option(help="The number of tokens that each change is computed from.")
    ] = 1024,
    window: Annotated[int, typer.Option(help="The number of tokens that the model sees at once.")] = 256,
    seed: Annotated[int, typer.Option(help="The seed of the order of the text, and of what is held out.")] = 0,
) -> None:
    """Train an adapter that makes up for pruned MLPs. The same command goes on where it stopped."""
    texts = [
        document for path in text for document in read_documents(str(path), **how_stored.reading, plain="text")
    ]
    with err.status("Loading ..."):
        from grating_core.lab.distill import distill as train
    try:
        found = train(
            settings.model,
            texts,
            output,
            mlp_density=mlp_density,
            rank=rank,
            learning_rate=learning_rate,
            steps=steps,
            tokens_per_step=tokens_per_step,
            window=window,
            seed=seed,
            device=settings.device,
            dtype=settings.dtype,
            revision=settings.revision,
            cache_dir=settings.cache_dir,
            local_files_only=settings.local_files_only,
            show_progress=True,
        )
    except KeyboardInterrupt:
        tell(f"Stopped. The same command goes on from the last state in {output}, if there is one.")
        raise typer.Exit(130) from None
    table = plain_table(f"on {found.held_out:,} tokens held out", "perplexity", "", "KL to dense")
    table.add_row("dense", f"{found.dense:.2f}")
    for name, loss in {"pruned": found.pruned, "pruned, with the adapter": found.recovered}.items():
        cost = f"{loss.perplexity / found.dense - 1:+.1%}"
        table.add_row(name, f"{loss.perplexity:.2f}", cost, f"{loss.divergence:.4f}")
    show(table)
    show(f"Trained on {found.trained:,} tokens. The adapter is in {found.directory}: give it as --adapter.")
