"""This is the command ``grating distill``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grating_core.cli.options import HUB, InputOptions, Takes
from grating_core.cli.output import err, show, tell
from grating_core.cli.tables import plain_table
from grating_core.settings import ModelSettings


def distill(
    settings: Annotated[ModelSettings, Takes(("device", "dtype", *HUB))],
    text: list[Path],
    directory: Path,
    how_stored: InputOptions,
    mlp_density: float = 0.5,
    rank: int = 32,
    learning_rate: float = 1e-3,
    steps: int = 400,
    tokens_per_step: int = 1024,
    window: int = 256,
    seed: int = 0,
) -> None:
    """Train an adapter that makes up for pruned MLPs. The same command goes on where it stopped.

    Args:
        text: A file of texts, of the kind the model will read. Several may be given.
        directory: A new directory for the adapter, or the one that a stopped run left.
        mlp_density: The share of the MLPs' weights that a token will use.
        rank: The rank of the adapter's changes.
        learning_rate: The highest learning rate, after the warm-up.
        steps: How often the adapter is changed.
        tokens_per_step: The number of tokens that each change is computed from.
        window: The number of tokens that the model sees at once.
        seed: The seed of the order of the text, and of what is held out.
    """
    texts = [document for path in text for document in how_stored.documents(path, "text")]
    with err.status("Loading ..."):
        from grating_core.lab.distill import distill as train
    try:
        found = train(
            settings.model,
            texts,
            directory,
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
        tell(f"Stopped. The same command goes on from the last state in {directory}, if there is one.")
        raise typer.Exit(130) from None
    table = plain_table(f"on {found.held_out:,} tokens held out", "perplexity", "", "KL to dense")
    table.add_row("dense", f"{found.dense:.2f}")
    for name, loss in {"pruned": found.pruned, "pruned, with the adapter": found.recovered}.items():
        cost = f"{loss.perplexity / found.dense - 1:+.1%}"
        table.add_row(name, f"{loss.perplexity:.2f}", cost, f"{loss.divergence:.4f}")
    show(table)
    show(f"Trained on {found.trained:,} tokens. The adapter is in {found.directory}: give it as --adapter.")
