"""A reranker in LlamaIndex: its settings, how LlamaIndex writes them down, and the requests that it gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle

from grating_core.frameworks.requests import checked_items, is_blank
from grating_core.frameworks.rerankers import RerankerFields, policy_as_json


class RerankerSettings(RerankerFields, BaseNodePostprocessor):  # type: ignore[misc]
    """These are the settings of a reranker. It is loaded on construction, and shared by all with the same ones.

    They are fixed from then on; ``model_copy(update={…})`` makes another object with other settings. Copies share
    the reranker. ``to_dict``, ``to_json`` and pickle keep the settings, from which the same one is made again.
    """

    # A permission that nothing needs: code that comes with a model is never run.
    ignored_arguments = ("trust_remote_code",)
    never_pickled = ("token", "callback_manager")  # those who listen are in this process

    @classmethod
    def class_name(cls) -> str:
        """Return the name that LlamaIndex serialises it under."""
        return cls.__name__

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Return the settings, as JSON can hold them, for :meth:`from_dict`.

        Args:
            kwargs: Arguments of pydantic's ``model_dump``.

        Raises:
            ValueError: A ready ``Reranker``, or a policy object of your own, is in it.
        """
        self._refuse_ready()
        data = super().to_dict(**kwargs)
        if "pruning" in data:
            data["pruning"] = policy_as_json(self.pruning, "from_dict(data, pruning=...)")
        return data


def checked_request(
    query: QueryBundle | None, nodes: Sequence[NodeWithScore]
) -> tuple[QueryBundle, list[NodeWithScore]]:
    """Return the query and the nodes of a request.

    Raises:
        ValueError: One of them is not there, or something else; the message names it.
    """
    if query is None:
        raise ValueError("query_bundle (or query_str) is missing: without a query nothing can be ranked")
    if not isinstance(query, QueryBundle):
        raise ValueError(f"query_bundle={query!r} must be a QueryBundle; a text goes to query_str=")
    is_blank(query.query_str, "query_str")
    return query, checked_items("nodes", nodes, NodeWithScore, "NodeWithScore(node=TextNode(text=...))")
