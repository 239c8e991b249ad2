"""A batch of rows is ranked in one pass, whoever makes the batches: Ray Data, Spark, Dask or pandas."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from grating_core.arguments import whole_number
from grating_core.requests import Request
from grating_core.reranker import Reranker
from grating_core.settings import RerankSettings

if TYPE_CHECKING:
    import pandas as pd

    Batch = TypeVar("Batch", pd.DataFrame, dict[str, Any])


class BatchReranker:
    """This callable adds scores to batches, which are data frames of pandas or dictionaries of NumPy arrays.

    A row has one of two forms:

    * ``query`` and ``documents``, a list of N texts. The row gets ``ranking``, the positions of its best
      ``min(top_k, N)`` documents, best first, and ``scores`` and ``probabilities`` in the same order.
    * ``query`` and ``text``. The row gets ``score`` and ``probability`` of the pair by the full model.

    Scores are raw logits.

    The model is loaded with the first batch. Pickling keeps only the settings, without a ``token``.

    Args:
        model: The model, see :meth:`Reranker.from_pretrained`.
        top_k: Number of documents of a row to rank. N or more ranks all, and nothing is pruned then.
        settings: The other settings of :meth:`Reranker.from_pretrained`.

    Raises:
        ValueError: A setting is not usable; the message names it.
    """

    def __init__(self, model: str | Path, *, top_k: int = 10, **settings: Any) -> None:
        self._settings = RerankSettings(model=model, **settings)
        self._top_k = whole_number("top_k", top_k)

    def __call__(self, batch: Batch) -> Batch:
        """Return a batch with all its columns and those of its ranking, computed in one pass if it fits.

        Raises:
            ValueError: A column is missing, or a row is not usable; the message names its position in the batch.
        """
        columns = sorted(map(str, batch))
        if {"query", "documents"} <= set(columns):
            return _with_columns(batch, self._ranked(batch["query"], batch["documents"]))
        if {"query", "text"} <= set(columns):
            scores = self._reranker.score(zip(batch["query"], batch["text"], strict=True))
            probabilities = list(map(self._reranker.probability, scores))
            return _with_columns(batch, {"score": np.array(scores), "probability": np.array(probabilities)})
        raise ValueError(f"the batch must have the columns query and documents, or query and text, not {columns}")

    def load(self) -> None:
        """Load the model now, not with the first batch. The errors are those of ``from_pretrained``."""
        _ = self._reranker

    def _ranked(self, queries: Iterable[str], documents: Iterable[Sequence[str]]) -> Mapping[str, NDArray[Any]]:
        requests = [Request(query, texts, self._top_k) for query, texts in zip(queries, documents, strict=True)]
        results = self._reranker.rerank_many(requests)
        return {
            "ranking": _lists([[ranked.index for ranked in result.ranking] for result in results]),
            "scores": _lists([[ranked.score for ranked in result.ranking] for result in results]),
            "probabilities": _lists([[ranked.probability for ranked in result.ranking] for result in results]),
        }

    @cached_property
    def _reranker(self) -> Reranker:
        """The process's reranker with these settings. Copies of this object share it."""
        return Reranker.open_shared(self._settings)

    def __getstate__(self) -> dict[str, Any]:
        return {"_settings": self._settings.portable(), "_top_k": self._top_k}


def _with_columns(batch: Batch, columns: Mapping[str, NDArray[Any]]) -> Batch:
    return {**batch, **columns} if isinstance(batch, dict) else batch.assign(**columns)


def _lists(rows: list[list[Any]]) -> NDArray[np.object_]:
    """Return an array that has a list in each place. NumPy would make a matrix of lists of the same length."""
    return np.fromiter(rows, dtype=object, count=len(rows))
