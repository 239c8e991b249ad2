"""``grating distill``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grating_core.cli.inputs import read_documents
from grating_core.cli.options import Device, Dtype, HubOptions, InputOptions
from grating_core.cli.output import err, show, tell
from grating_core.cli.tables import plain_table


def distill(
    model: Annotated[str, typer.Argument(help="Language model: hub id or local directory.")],
    text: Annotated[list[Path], typer.Option(help="File of texts, of the kind the model will read; or several.")],
    output: Annotated[Path, typer.Option(help="New directory for the adapter, or one that a stopped run left.")],
    how_stored: InputOptions,
    hub: HubOptions,
    mlp_density: Annotated[float, typer.Option(help="Share of the MLPs' weights that a token will use.")] = 0.5,
    rank: Annotated[int, typer.Option(help="Rank of the adapter's changes.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="Its highest value.")] = 1e-3,
    steps: Annotated[int, typer.Option(help="How often the adapter is changed.")] = 400,
    tokens_per_step: Annotated[int, typer.Option(help="Tokens that each change is computed from.")] = 1024,
    window: Annotated[int, typer.Option(help="Tokens that the model sees at once.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of the order of the text, and of what is held out.")] = 0,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Train an adapter that makes up for pruned MLPs. The same command goes on where it stopped."""
    texts = [
        document for path in text for document in read_documents(str(path), **how_stored.reading, plain="text")
    ]
    with err.status("Loading ..."):
        from grating_core.lab.distill import distill as train
    try:
        found = train(
            model,
            texts,
            output,
            mlp_density=mlp_density,
            rank=rank,
            learning_rate=learning_rate,
            steps=steps,
            tokens_per_step=tokens_per_step,
            window=window,
            seed=seed,
            device=device,
            dtype=dtype,
            **vars(hub),
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
