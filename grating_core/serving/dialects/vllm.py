"""The dialect of vLLM's score API: the scores of pairs of texts, in the order in which they came.

https://docs.vllm.ai, "Score API". Its rerank API is Cohere's.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import groupby
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AliasChoices, BaseModel, BeforeValidator, Field, model_validator

from grating_core.requests import Request
from grating_core.results import RerankResult
from grating_core.serving.schemas import Body, Call, Document, Query, Usage, UseActivation


def _as_list(texts: object) -> object:
    return texts if isinstance(texts, list) else [texts]


class Score(BaseModel):
    """The score of a pair."""

    index: int
    object: Literal["score"] = "score"
    score: float


class ScoreAnswer(BaseModel):
    """The scores of all pairs, in the order in which they came."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Score]
    usage: Usage


class ScoreBody(Body):
    """One text against many, or pairs of texts, as vLLM takes them."""

    field: ClassVar[str] = "text_2"

    text_1: Annotated[list[Query], BeforeValidator(_as_list, json_schema_input_type=Query | list[Query])] = Field(
        validation_alias=AliasChoices("text_1", "queries", "data_1"),
        min_length=1,
        description="The question, or one for each text. Its other names are queries and data_1.",
    )
    text_2: Annotated[
        list[Document], BeforeValidator(_as_list, json_schema_input_type=Document | list[Document])
    ] = Field(
        validation_alias=AliasChoices("text_2", "documents", "items", "data_2"),
        description="The texts to be scored. Its other names are documents, items and data_2.",
    )
    use_activation: UseActivation = None

    ranks: ClassVar[bool] = False

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if len(self.text_1) not in (1, len(self.text_2)):
            raise ValueError(
                f"text_1 has {len(self.text_1)} texts and text_2 has {len(self.text_2)}; give one, or as many"
            )
        if self.grating.score_threshold is not None:
            raise ValueError("score_threshold leaves out documents of a ranking, and this answer has every score")
        return self

    @property
    def raw(self) -> bool:
        """See :attr:`Body.raw`."""
        return self.use_activation is False or self.grating.raw_scores

    def requests(self) -> list[Request]:
        """See :meth:`Body.requests`. Neighbours with the same question are one request."""
        asked = self.text_1 * len(self.text_2) if len(self.text_1) == 1 else self.text_1
        pairs = zip(asked, self.text_2, strict=True)
        return [
            self.request(query, [text for _, text in same], None)
            for query, same in groupby(pairs, key=lambda pair: pair[0])
        ]

    def answer(self, results: Sequence[RerankResult], call: Call) -> ScoreAnswer:
        """See :meth:`Body.answer`."""
        scores = [
            self.score(ranked)
            for result in results
            for ranked in sorted(result.ranking, key=lambda ranked: ranked.index)
        ]
        return ScoreAnswer(
            id=call.id,
            created=int(time.time()),
            model=call.model,
            data=[Score(index=index, score=score) for index, score in enumerate(scores)],
            usage=Usage.of(results),
        )
