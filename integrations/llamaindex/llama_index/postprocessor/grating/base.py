"""The node postprocessor."""

from __future__ import annotations

from typing import Literal

from llama_index.core.bridge.pydantic import ConfigDict, Field, model_validator
from llama_index.core.callbacks import CBEventType, EventPayload
from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle
from typing_extensions import Self

from grating_core import Prompt, PruningPolicy, Reranker

dispatcher = get_dispatcher(__name__)

_SETTINGS = (
    "model", "device", "dtype", "memory_budget", "max_length", "long_documents", "template", "instruction",
    "adapter", "pruning", "target", "guarantee", "lens", "recalibrate",
)  # fmt: skip


class GratingRerank(BaseNodePostprocessor):
    """Keeps the ``top_n`` nodes that answer the query best, best first.

    The model is loaded on construction, and shared with whoever uses the same settings. The caller's nodes and
    their scores are left as they are.

    Example:
        .. code-block:: python

            reranker = GratingRerank(model="bundled:ms-marco-minilm-l12", top_n=3)
            engine = index.as_query_engine(similarity_top_k=20, node_postprocessors=[reranker])
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    top_n: int = Field(default=3, ge=1, description="How many nodes to keep.")
    scores: Literal["exact", "estimated"] = Field(
        default="exact",
        description="'exact': as the full model's. 'estimated': sure winners stop early, which is faster; "
        "their nodes' scores are estimates.",
    )
    keep_retrieval_score: bool = Field(
        default=False, description="Whether to keep the retriever's score as 'retrieval_score' in the metadata."
    )
    model: str = Field(
        default="cross-encoder/ms-marco-MiniLM-L12-v2",
        description="Hub id, local directory, or 'bundled:ms-marco-minilm-l12'.",
    )
    device: str | None = Field(
        default=None, description="'cpu', 'cuda' or 'mps'; None takes the best that is there."
    )
    dtype: str = Field(
        default="auto",
        description="'float32', 'bfloat16', 'float16', or 'auto': bfloat16 where the device is made for it.",
    )
    memory_budget: str | int | None = Field(
        default=None,
        description="How much memory it may take, in bytes or such as '300MB'; None keeps everything resident.",
    )
    max_length: int | None = Field(
        default=None,
        description="Most tokens of a query and document together; None for what the model was made for.",
    )
    long_documents: Literal["truncate", "windows"] = Field(
        default="truncate",
        description="What to do with a document that does not fit: cut its end, or take its best window.",
    )
    template: Prompt | str | None = Field(
        default=None,
        description="How a decoder is asked: a Prompt, the name of an official one, or None for the model's own.",
    )
    instruction: str | None = Field(
        default=None, description="What to judge by, for models that take an instruction."
    )
    adapter: str | None = Field(
        default=None, description="LoRA adapter, a directory or hub id, that is merged into the weights."
    )
    pruning: str | PruningPolicy = Field(
        default="auto", description="'auto', 'cluster', 'off', or a policy object."
    )
    target: float = Field(
        default=0.98,
        description="Share of the full model's top K that a lens, or recalibration, is to keep on average.",
    )
    guarantee: Literal["share", "set"] = Field(
        default="share", description="'set': the target is the probability that the whole top K is kept."
    )
    lens: str | None = Field(
        default=None,
        description="Directory with the lens to prune by; None for the one that belongs to the model.",
    )
    recalibrate: float = Field(
        default=0.0,
        description="Share of requests that are computed again when idle, so that pruning stays at the target.",
    )
    reranker: Reranker = Field(
        default=None,  # type: ignore[assignment]  # only until _load has run
        exclude=True,
        repr=False,
        description="A ready Reranker, instead of all settings of the model.",
    )

    @model_validator(mode="after")
    def _load(self) -> Self:
        if "reranker" not in self.model_fields_set:
            self.reranker = Reranker.shared(**{name: getattr(self, name) for name in _SETTINGS})
        elif clash := [name for name in _SETTINGS if name in self.model_fields_set]:
            raise ValueError(f"reranker is given and brings its own {', '.join(clash)}: leave those out")
        else:
            self.model = str(self.reranker.model_path)
        return self

    @classmethod
    def class_name(cls) -> str:
        """The name that LlamaIndex serialises it under."""
        return "GratingRerank"

    # The base class runs this in a worker thread for its asynchronous twin.
    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if query_bundle is None:
            raise ValueError("query_bundle (or query_str) is missing: without a query nothing can be ranked")
        if not nodes:
            return []
        query = query_bundle.query_str
        dispatcher.event(
            ReRankStartEvent(query=query_bundle, nodes=nodes, top_n=self.top_n, model_name=self.model)
        )
        with self.callback_manager.event(
            CBEventType.RERANKING,
            payload={
                EventPayload.NODES: nodes,
                EventPayload.MODEL_NAME: self.model,
                EventPayload.QUERY_STR: query,
                EventPayload.TOP_K: self.top_n,
            },
        ) as event:
            texts = [node.node.get_content(metadata_mode=MetadataMode.EMBED) for node in nodes]
            result = self.reranker.rerank(query, texts, self.top_n, scores=self.scores)
            reranked = [self._with_score(nodes[ranked.index], ranked.score) for ranked in result.ranking]
            event.on_end(payload={EventPayload.NODES: reranked})
        dispatcher.event(ReRankEndEvent(nodes=reranked))
        return reranked

    def _with_score(self, retrieved: NodeWithScore, score: float) -> NodeWithScore:
        node = retrieved.node
        if self.keep_retrieval_score:
            node = node.model_copy(update={"metadata": {**node.metadata, "retrieval_score": retrieved.score}})
        return NodeWithScore(node=node, score=score)
