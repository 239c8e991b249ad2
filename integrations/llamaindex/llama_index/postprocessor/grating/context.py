"""The context selector: long nodes cut down to a budget of tokens."""

from __future__ import annotations

from uuid import uuid4

from llama_index.core.schema import BaseNode, MetadataMode, NodeRelationship, NodeWithScore, QueryBundle, TextNode
from llama_index.postprocessor.grating.settings import RerankerSettings, checked_request

from grating_core.context import Passage
from grating_core.forking import run_in_thread
from grating_core.frameworks.nested import copied
from grating_core.frameworks.requests import is_blank, position
from grating_core.frameworks.rerankers import SelectingFields

_SHARED = (
    "excluded_embed_metadata_keys", "excluded_llm_metadata_keys", "metadata_template", "metadata_separator",
    "text_template",
)  # fmt: skip
"""These fields say how metadata are shown; a part has them from the whole."""


class GratingContextSelector(SelectingFields, RerankerSettings):  # type: ignore[misc]
    """This class keeps the passages of long nodes that answer the query best, within a budget of tokens.

    The texts are divided into chunks, the reranker judges them, and as many of the best are kept as fit. They come
    in the order of the nodes and of the text, chunks that adjoin as one node. A node of which only a part is kept
    is replaced by new ones: with its metadata, its source or else itself as their source, and their place in that
    as ``start_char_idx`` and ``end_char_idx``. The caller's nodes are left as they are. If everything fits, all
    nodes with text are returned, with the scores they had.

    The budget is for the texts with blank lines between them, without the metadata that a prompt adds to each.

    Example:
        .. code-block:: python

            selector = GratingContextSelector(model="bundled:ms-marco-minilm-l12", max_tokens=4000)
            engine = index.as_query_engine(similarity_top_k=5, node_postprocessors=[selector])
    """

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        return await run_in_thread(self._postprocess_nodes, nodes, query_bundle)

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query, nodes = checked_request(query_bundle, nodes)
        texts = [node.node.get_content(metadata_mode=MetadataMode.NONE) for node in nodes]
        passages = self._passages(query.query_str, texts)
        if is_blank(query.query_str):  # nothing was judged
            nodes = [NodeWithScore(node=node.node) for node in nodes]
        return [_cut(nodes[passage.document], passage, self._score(passage)) for passage in passages]


def _cut(retrieved: NodeWithScore, passage: Passage, score: float | None) -> NodeWithScore:
    node = retrieved.node
    score = retrieved.score if score is None else score
    if passage.text == node.get_content(metadata_mode=MetadataMode.NONE):
        return NodeWithScore(node=node, score=score)
    return NodeWithScore(node=_part(node, passage), score=score)


def _part(node: BaseNode, passage: Passage) -> TextNode:
    """Return a new node with a passage. Only a TextNode can say where it begins, so others become one."""
    source = node.source_node
    # Places are counted from the beginning of the source; nobody knows them if the node does not know its own.
    origin = 0 if source is None else position(getattr(node, "start_char_idx", None))
    known = {
        "id_": str(uuid4()),
        "text": passage.text,
        "metadata": copied(node.metadata),
        "embedding": None,
        "start_char_idx": None if origin is None else origin + passage.start,
        "end_char_idx": None if origin is None else origin + passage.end,
        "relationships": {NodeRelationship.SOURCE: source or node.as_related_node_info()},
    }
    if isinstance(node, TextNode):
        return node.model_copy(update=known)
    return TextNode(**known, **{name: getattr(node, name) for name in _SHARED if hasattr(node, name)})
