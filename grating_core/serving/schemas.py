"""Here is what the bodies of all dialects share. Bodies are checked by these schemas, and /docs shows them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from grating_core.arguments import check_threshold
from grating_core.pruning import ClusterPolicy, Off, PruningPolicy
from grating_core.requests import Request
from grating_core.results import LayerTrace, RankedDocument, RerankResult
from grating_core.serving.errors import Refused, told

_POLICIES: dict[str, PruningPolicy] = {"cluster": ClusterPolicy(), "off": Off()}


def _text_of(document: Any) -> str:
    text = document.get("text") if isinstance(document, dict) else document
    if not isinstance(text, str):
        raise PydanticCustomError("document", "must be a string, or an object whose text is a string")
    return text


def _not_blank(query: str) -> str:
    if not query.strip():
        raise PydanticCustomError("query", "must not be blank")
    return query


_TEXT = {"type": "string"}
_OBJECT = {"type": "object", "properties": {"text": _TEXT}, "required": ["text"]}

Document = Annotated[str, BeforeValidator(_text_of), WithJsonSchema({"anyOf": [_TEXT, _OBJECT]})]
"""A document is a string, or an object with the string in ``text``."""

Query = Annotated[str, AfterValidator(_not_blank), Field(description="The question. It is not blank.")]


class Wishes(BaseModel):
    """What only grating does, in the object ``grating`` of a request."""

    model_config = ConfigDict(extra="forbid")

    target: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="The share of the best top_n that pruning keeps, on average; null as served.",
    )
    pruning: Literal["auto", "cluster", "off"] = Field(
        default="auto",
        description="How documents are dropped early: as the server does, by the paper's rule, or never.",
    )
    scores: Literal["exact", "estimated"] = Field(
        default="exact", description="Whether sure winners go through every layer, or stop early with an estimate."
    )
    deadline_ms: int | None = Field(
        default=None,
        ge=1,
        description="The milliseconds after which the best ranking so far is the answer; null, and at most, as "
        "served.",
    )
    score_threshold: float | None = Field(
        default=None,
        description="The least score of a document in the answer, from 0 to 1; null leaves none out.",
    )
    raw_scores: bool = Field(
        default=False, description="Whether scores and the threshold are raw logits, not probabilities."
    )
    trace: bool = Field(
        default=False, description="Whether the answer tells layer by layer who was still computed."
    )


UseActivation = Annotated[
    bool | None,
    Field(
        validation_alias=AliasChoices("use_activation", "activation", "softmax"),
        description="Whether scores are probabilities; false returns raw logits, null as grating.raw_scores says.",
    ),
]
"""How vLLM's clients ask for raw scores."""


class Layer(BaseModel):
    """One layer of a trace: which documents were computed, their provisional scores, and what became of them."""

    layer: int
    alive: Sequence[int]
    scores: Sequence[float]
    routes: Sequence[str]
    seconds: float

    @classmethod
    def of(cls, one: LayerTrace) -> Self:
        """Return a layer of a trace."""
        return cls(layer=one.layer, alive=one.alive, scores=one.scores, routes=one.routes, seconds=one.seconds)


class Account(BaseModel):
    """What an answer took, in its object ``grating``."""

    compute_share: float = Field(description="Tokens × layers computed, as a share of those without pruning.")
    estimated: Sequence[int] = Field(description="The documents in the results whose score is an estimate.")
    truncated: Sequence[int] = Field(description="The documents that did not fit and were cut.")
    cut_short: bool = Field(description="Whether the deadline came before all was computed.")
    tokens: int = Field(description="The tokens of all documents, each with the query.")
    seconds: float = Field(description="Seconds of waiting and computing.")
    layers: Sequence[Layer] | None = Field(default=None, description="The trace, if it was asked for.")

    @classmethod
    def of(cls, result: RerankResult, wishes: Wishes) -> Self:
        """Return the account of a result."""
        trace = result.trace
        return cls(
            compute_share=trace.compute_share,
            estimated=[ranked.index for ranked in result.ranking if ranked.estimated],
            truncated=trace.truncated,
            cut_short=trace.cut_short,
            tokens=sum(trace.lengths),
            seconds=trace.seconds,
            layers=list(map(Layer.of, trace.layers)) if wishes.trace else None,
        )


class Usage(BaseModel):
    """The tokens of a request, as OpenAI's kind of API counts them."""

    prompt_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, results: Sequence[RerankResult]) -> Self:
        """Return the tokens of all results together."""
        tokens = sum(sum(result.trace.lengths) for result in results)
        return cls(prompt_tokens=tokens, total_tokens=tokens)


@dataclass(frozen=True)
class Call:
    """A call is what an answer repeats of its request.

    Attributes:
        id: The request's id.
        model: The name of the model.
        path: The path that was called.
    """

    id: str
    model: str
    path: str


class Body(BaseModel):
    """The body of a request, in one dialect. Fields that a dialect has for other servers are ignored."""

    field: ClassVar[str]
    """The field of the documents."""

    ranks: ClassVar[bool] = True
    """Whether the answer is a ranking, of which a deadline leaves the best there is. Mere scores have no such."""

    model: str | None = Field(default=None, description="The name of the model; null takes the server's first.")
    grating: Wishes = Field(default_factory=Wishes, description="What only grating does.")

    @model_validator(mode="after")
    def _check_threshold(self) -> Self:
        check_threshold(self.grating.score_threshold, raw_scores=self.raw, scores=self.grating.scores)
        return self

    @property
    def cuts(self) -> bool:
        """Whether long documents are cut. Otherwise they are refused."""
        return True

    @property
    def raw(self) -> bool:
        """Whether scores are raw logits."""
        return self.grating.raw_scores

    @abstractmethod
    def requests(self) -> list[Request]:
        """Return the requests that the body asks for."""

    @abstractmethod
    def answer(self, results: Sequence[RerankResult], call: Call) -> BaseModel:
        """Return the answer in the body's dialect."""

    @classmethod
    def refusal(cls, refused: Refused, request_id: str) -> dict[str, Any]:
        """Return the body of a refusal in the dialect."""
        return told(refused, request_id)

    def request(self, query: str, documents: Sequence[str], top_n: int | None) -> Request:
        """Return a request with the wishes of the body. No ``top_n``, or 0, wants all documents."""
        wishes, policy = self.grating, _POLICIES.get(self.grating.pruning)
        target = None if policy is not None else wishes.target
        top_k = top_n or max(1, len(documents))
        return Request(
            query,
            documents,
            top_k,
            scores=wishes.scores,
            pruning=policy,
            target=target,
            score_threshold=wishes.score_threshold,
            raw_scores=self.raw,
        )

    def score(self, ranked: RankedDocument) -> float:
        """Return the score that the answer has for a document."""
        return ranked.score if self.raw else ranked.probability
