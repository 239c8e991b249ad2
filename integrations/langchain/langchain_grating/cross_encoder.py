"""The cross-encoder."""

from __future__ import annotations

from langchain_core.cross_encoders import BaseCrossEncoder

from langchain_grating.settings import RerankerSettings


class GratingCrossEncoder(RerankerSettings, BaseCrossEncoder):
    """Scores pairs of texts, for instance for langchain-classic's ``CrossEncoderReranker``.

    Every pair goes through the full model; to select documents, :class:`GratingRerank` computes less.

    Example:
        .. code-block:: python

            encoder = GratingCrossEncoder(model="bundled:ms-marco-minilm-l12")
            compressor = CrossEncoderReranker(model=encoder, top_n=3)
    """

    def score(self, text_pairs: list[tuple[str, str]]) -> list[float]:
        """Score the relevance of each text to its query.

        Args:
            text_pairs: ``(query, text)`` for each score wanted.

        Returns:
            Scores in the order of the pairs: raw logits, higher is more relevant.

        Raises:
            ValueError: A query is empty; the message names the pair.
        """
        return self.reranker.score(text_pairs)
