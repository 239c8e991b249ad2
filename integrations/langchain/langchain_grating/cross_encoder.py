"""The cross-encoder."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from langchain_core.cross_encoders import BaseCrossEncoder
from pydantic import Field

from langchain_grating.settings import RerankerSettings


class GratingCrossEncoder(RerankerSettings, BaseCrossEncoder):  # type: ignore[misc]
    """This cross-encoder scores pairs of texts, for instance for langchain-classic's ``CrossEncoderReranker``.

    Its scores are on the scale of ``HuggingFaceCrossEncoder``'s: probabilities, or raw logits where the checkpoint
    names ``Identity``, as those of ms-marco on the hub do.

    Every pair goes through the full model; to select documents, :class:`GratingRerank` computes less.

    Example:
        .. code-block:: python

            encoder = GratingCrossEncoder(model="bundled:ms-marco-minilm-l12")
            compressor = CrossEncoderReranker(model=encoder, top_n=3)
    """

    raw_scores: bool | None = Field(
        default=None,
        description="Whether scores are raw logits in the place of probabilities. None does what "
        "sentence-transformers does with this model.",
    )

    def score(self, text_pairs: list[tuple[str, str]]) -> list[float]:
        """Score the relevance of each text to its query.

        Args:
            text_pairs: ``(query, text)`` for each score wanted. Of a query longer than half of what the model can
                read the end is used. A blank one asks nothing: all texts have the score 0.0 then, so that they
                stay in their order.

        Returns:
            Scores in the order of the pairs, higher is more relevant.

        Raises:
            ValueError: A pair is not two texts; the message names it.
        """
        pairs = [_checked(index, pair) for index, pair in enumerate(text_pairs)]
        end = cache(self.reranker.tail)
        scores = self.reranker.score([(end(query), text) for query, text in pairs if query.strip()])
        raw = self.reranker.shows_logits if self.raw_scores is None else self.raw_scores
        found = iter(scores if raw else map(self.reranker.probability, scores))
        return [next(found) if query.strip() else 0.0 for query, _ in pairs]


def _checked(index: int, pair: Iterable[str]) -> tuple[str, str]:
    texts = () if isinstance(pair, str) or not isinstance(pair, Iterable) else tuple(pair)
    if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"text_pairs[{index}]={pair!r} must be a query and a text")
    return texts
