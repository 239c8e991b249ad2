"""This is the command ``grating select``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from grating_core.cli.options import BUNDLED, InputOptions, Takes
from grating_core.cli.output import err, write, write_json, write_json_lines, write_text
from grating_core.settings import RerankSettings


def select(
    query: str,
    input: str,
    max_tokens: int,
    how_stored: InputOptions,
    settings: Annotated[RerankSettings, Takes(model=BUNDLED, without=("long_documents",))],
    chunk_tokens: int = 256,
    format: Literal["text", "json", "jsonl"] = "text",
    as_json: bool = False,
    output: Path | None = None,
) -> None:
    """Print the passages of a long text that answer a question best, in their order, for a prompt.

    Args:
        input: The file of a text or of documents, or - for standard input.
        max_tokens: The most tokens to print, as the model counts them.
        chunk_tokens: The most tokens of a chunk, about.
        format: How the passages are printed. JSON tells their positions.
    """
    texts = how_stored.documents(input, "text")
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
