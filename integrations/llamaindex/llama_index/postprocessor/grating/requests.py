"""What LlamaIndex hands to a postprocessor."""

from __future__ import annotations

from collections.abc import Sequence

from llama_index.core.schema import NodeWithScore, QueryBundle

from grating_core.frameworks.requests import checked_items, is_blank


def checked_request(
    query: QueryBundle | None, nodes: Sequence[NodeWithScore]
) -> tuple[QueryBundle, list[NodeWithScore]]:
    """The query and the nodes of a request.

    Raises:
        ValueError: One of them is not there, or something else; the message names it.
    """
    if query is None:
        raise ValueError("query_bundle (or query_str) is missing: without a query nothing can be ranked")
    if not isinstance(query, QueryBundle):
        raise ValueError(f"query_bundle={query!r} must be a QueryBundle; a text goes to query_str=")
    is_blank(query.query_str, "query_str")
    return query, checked_items("nodes", nodes, NodeWithScore, "NodeWithScore(node=TextNode(text=...))")
