"""``grating select``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from grating_core.cli.options import InputOptions, Query, RerankerOptions
from grating_core.cli.output import err, print_json
from grating_core.inputs import read_documents


def select(
    query: Query,
    input: Annotated[
        str, typer.Option("--input", "-i", help="File of a text or documents, or - for standard input.")
    ],
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", help="Most tokens to print, by the model's count.")
    ],
    how_stored: InputOptions,
    settings: RerankerOptions,
    chunk_tokens: Annotated[int, typer.Option(help="About how many tokens a chunk has at most.")] = 256,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with positions, instead of text.")] = False,
) -> None:
    """Print the passages of a long text that answer a question best, in their order, for a prompt."""
    texts = read_documents(input, **vars(how_stored), plain="text")
    with err.status("Loading ..."):
        from grating_core.context import join_passages, select_context
        from grating_core.reranker import Reranker

        with Reranker.from_pretrained(**vars(settings), show_progress=True) as reranker:
            passages = select_context(
                query, texts, reranker=reranker, max_tokens=max_tokens, chunk_tokens=chunk_tokens
            )
    if as_json:
        print_json({"query": query, "passages": [asdict(passage) for passage in passages]})
    else:
        typer.echo(join_passages(passages))
