"""The dialect of text-embeddings-inference: ``texts`` in, a bare list out.

See https://huggingface.github.io/text-embeddings-inference. Its server may refuse a text that is too long where
``truncate`` is left out; here a text is only refused if the client itself says ``truncate: false``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field, RootModel

from grating_core.requests import Request
from grating_core.results import RerankResult
from grating_core.serving.errors import Refused
from grating_core.serving.models import ServedModel
from grating_core.serving.schemas import Body, Call, Query
from grating_core.serving.settings import ServeSettings

_OWN_KINDS = ("validation", "overloaded", "unhealthy", "backend", "tokenizer", "empty")


class Rank(BaseModel):
    """A text's place in the ranking."""

    index: int
    score: float
    text: str | None = None


class Ranks(RootModel[list[Rank]]):
    """The ranking, best first."""


class TextsBody(Body):
    """A question and texts to be ranked, as text-embeddings-inference takes them."""

    field: ClassVar[str] = "texts"

    query: Query
    texts: list[str] = Field(description="The texts to be ranked.")
    raw_scores: bool = Field(default=False, description="Whether scores are raw logits, not probabilities.")
    return_text: bool = Field(default=False, description="Whether the answer has the texts.")
    truncate: bool | None = Field(
        default=None, description="Whether long texts are cut. false refuses them; null cuts."
    )
    truncation_direction: Literal["Right", "right"] = Field(
        default="Right", description="Only the end of a text is cut."
    )

    @property
    def cuts(self) -> bool:
        """See :attr:`Body.cuts`."""
        return self.truncate is not False

    @property
    def raw(self) -> bool:
        """See :attr:`Body.raw`."""
        return self.raw_scores or self.grating.raw_scores

    def requests(self) -> list[Request]:
        """See :meth:`Body.requests`."""
        return [self.request(self.query, self.texts, None)]

    def answer(self, results: Sequence[RerankResult], call: Call) -> Ranks:
        """See :meth:`Body.answer`."""
        (result,) = results
        return Ranks(
            [
                Rank(index=ranked.index, score=self.score(ranked), text=ranked.text if self.return_text else None)
                for ranked in result.ranking
            ]
        )

    @classmethod
    def refusal(cls, refused: Refused, request_id: str) -> dict[str, Any]:
        """See :meth:`Body.refusal`."""
        kind = refused.kind if refused.kind in _OWN_KINDS else "validation"
        return {"error": refused.message, "error_type": kind}


class Labels(BaseModel):
    """The one label of a reranker."""

    id2label: dict[str, str] = {"0": "LABEL_0"}
    label2id: dict[str, int] = {"LABEL_0": 0}


class ModelType(BaseModel):
    """What the model is."""

    reranker: Labels = Labels()


class Info(BaseModel):
    """What text-embeddings-inference tells of its model and its limits."""

    model_id: str
    model_sha: str | None = None
    model_dtype: str
    model_type: ModelType = ModelType()
    max_concurrent_requests: int
    max_input_length: int
    max_batch_tokens: int
    max_batch_requests: int | None = None
    max_client_batch_size: int
    auto_truncate: bool = True
    tokenization_workers: int
    version: str


def info(model: ServedModel, server: ServeSettings, version: str) -> Info:
    """Return what a client may ask about a model."""
    reranker = model.reranker
    return Info(
        model_id=model.name,
        model_dtype=str(reranker.dtype).removeprefix("torch."),
        max_concurrent_requests=max(1, server.queue_tokens // reranker.max_length),
        max_input_length=reranker.max_length,
        max_batch_tokens=reranker.scorer.pass_tokens,
        max_client_batch_size=server.max_documents,
        tokenization_workers=1,
        version=version,
    )
