"""``grating select``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Literal

import typer

from grating_core.cli.inputs import read_documents
from grating_core.cli.options import BUNDLED, AsJson, InputOptions, Output, Query, Takes, in_panel
from grating_core.cli.output import err, write, write_json, write_json_lines, write_text
from grating_core.settings import RerankSettings


def select(
    query: Query,
    input: Annotated[
        str,
        in_panel["input"]("--input", "-i", help="The file of a text or of documents, or - for standard input."),
    ],
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", min=1, help="The most tokens to print, as the model counts them.")
    ],
    how_stored: InputOptions,
    settings: Annotated[RerankSettings, Takes(model=BUNDLED, without=("long_documents",))],
    chunk_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of a chunk, about.")] = 256,
    format: Annotated[
        Literal["text", "json", "jsonl"],
        in_panel["output"](help="How the passages are printed. JSON tells their positions."),
    ] = "text",
    as_json: AsJson = False,
    output: Output = None,
) -> None:
    """Print the passages of a long text that answer a question best, in their order, for a prompt."""
    texts = read_documents(input, **how_stored.reading, plain="text")
    with err.status("Loading ..."):
        from grating_core.context import join_passages, select_context
        from grating_core.reranker import Reranker

        with Reranker.open(settings) as reranker:
            passages = select_context(
                query, texts, reranker=reranker, max_tokens=max_tokens, chunk_tokens=chunk_tokens
            )
    if as_json or format == "json":
        write_json({"query": query, "passages": [asdict(passage) for passage in passages]}, output)
    elif format == "jsonl":
        write_json_lines(map(asdict, passages), output)
    elif output is not None:
        write(join_passages(passages) + "\n", output)
    else:
        write_text(join_passages(passages) + "\n")
