"""The dialect of Cohere's API, versions 1 and 2, which Jina's, vLLM's and llama.cpp's servers speak as well.

See https://docs.cohere.com/reference/rerank, https://api.jina.ai/redoc and https://docs.vllm.ai. An answer has
what any of them has: ``results`` are the same for all, ``meta`` is Cohere's, ``object``, ``model`` and ``usage``
are the others'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import BaseModel, Field

from grating_core.requests import Request
from grating_core.results import RerankResult
from grating_core.serving.schemas import Account, Body, Call, Document, Query, Usage, UseActivation


class ResultDocument(BaseModel):
    """The text of a document."""

    text: str


class Result(BaseModel):
    """A document's place in the ranking."""

    index: int = Field(description="The document's position in the request.")
    relevance_score: float
    document: ResultDocument | None = None


class Version(BaseModel):
    """The version of Cohere's API."""

    version: str


class BilledUnits(BaseModel):
    """What Cohere would count."""

    search_units: int = 1


class Tokens(BaseModel):
    """The tokens that went in and came out."""

    input_tokens: int
    output_tokens: int = 0


class Meta(BaseModel):
    """What Cohere's clients read beside the results."""

    api_version: Version
    billed_units: BilledUnits
    tokens: Tokens


class RerankAnswer(BaseModel):
    """The ranking, best first."""

    id: str
    object: Literal["list"] = "list"
    model: str
    results: list[Result]
    usage: Usage
    meta: Meta
    grating: Account


class RerankBody(Body):
    """A question and documents to be ranked, as Cohere, Jina, vLLM and llama.cpp take them."""

    field: ClassVar[str] = "documents"

    query: Query
    documents: list[Document] = Field(description="The documents: strings, or objects with text.")
    top_n: int | None = Field(
        default=None,
        ge=0,
        description="How many documents to return. null, 0, or as many as there are, returns all.",
    )
    return_documents: bool | None = Field(
        default=None, description="Whether results have the documents' texts. null does so as Jina and vLLM do."
    )

    use_activation: UseActivation = None

    @property
    def raw(self) -> bool:
        """See :attr:`Body.raw`."""
        return self.use_activation is False or self.grating.raw_scores

    def requests(self) -> list[Request]:
        """See :meth:`Body.requests`."""
        return [self.request(self.query, self.documents, self.top_n)]

    def answer(self, results: Sequence[RerankResult], call: Call) -> RerankAnswer:
        """See :meth:`Body.answer`."""
        (result,) = results
        shown = self.return_documents is not False
        usage = Usage.of(results)
        return RerankAnswer(
            id=call.id,
            model=call.model,
            results=[
                Result(
                    index=ranked.index,
                    relevance_score=self.score(ranked),
                    document=ResultDocument(text=ranked.text) if shown else None,
                )
                for ranked in result.ranking
            ],
            usage=usage,
            meta=Meta(
                api_version=Version(version="2" if call.path.startswith("/v2/") else "1"),
                billed_units=BilledUnits(),
                tokens=Tokens(input_tokens=usage.prompt_tokens),
            ),
            grating=Account.of(result, self.grating),
        )
