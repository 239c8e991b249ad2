"""Sequences that a slice has whole: the features of all of them are computed together.

What is as long as a document is looked at document by document, because it then stays in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

SIMILARITIES = 5
"""The number of similarities beside the product with the most similar token."""

SMALLEST = 1e-12
"""The least norm of a state that cosines are computed with."""


def whole_features(
    sequences: Sequence[Tensor],
    queries: Sequence[Tensor],
    documents: Sequence[Tensor],
    pooling: str,
    *,
    similarities: bool,
) -> Tensor:
    """Compute the features of sequences.

    Args:
        sequences: Hidden states of the own tokens of N sequences, at least one, ``[T, D]`` each.
        queries: Hidden states of each sequence's query, all ``[Q, D]``.
        documents: Hidden states of each sequence's document, ``[L, D]`` each.
        pooling: The token that the head reads: ``"first"``, ``"last"``, or ``"mean"`` of all own tokens.
        similarities: Whether the tokens of query and document are compared.

    Returns:
        The features, float32 ``[N, F]``, see :class:`grating_core.lens.features.Features`.
    """
    asked, told = _means(queries), _means(documents)
    features = [_read(sequences, pooling), asked, told, asked * told]
    if similarities and len(queries[0]):
        # To a state of zeros nothing is similar.
        some = [one if len(one) else one.new_zeros(1, one.shape[1]) for one in documents]
        features.append(_compared(torch.stack(list(queries)).float(), some))
    elif similarities:
        features.append(asked.new_zeros(len(asked), asked.shape[1] + SIMILARITIES))
    return torch.cat(features, dim=1)


def _read(sequences: Sequence[Tensor], pooling: str) -> Tensor:
    """Return the state that the head reads of each sequence, float32 ``[N, D]``."""
    if pooling == "mean":
        return _means(sequences)
    return torch.stack([states[-1 if pooling == "last" else 0] for states in sequences]).float()


def _means(groups: Sequence[Tensor]) -> Tensor:
    """Return the mean of the rows of each tensor, float32 ``[N, D]``; zero where there are none."""
    sums = torch.stack([group.sum(0, dtype=torch.float32) for group in groups])
    return sums / torch.tensor([[max(1, len(group))] for group in groups], device=sums.device)


def _compared(queries: Tensor, documents: Sequence[Tensor]) -> Tensor:
    """Compare the tokens of each query, float32 ``[N, Q, D]``, with those of its document, ``[L, D]``."""
    lengths = [len(document) for document in documents]
    cosines = queries.new_empty(sum(lengths), queries.shape[1])
    norms = queries.new_empty(len(cosines))
    room = queries.new_empty(max(lengths), queries.shape[2])
    parts = torch.split(cosines, lengths)
    directions = normalize(queries, dim=2).transpose(1, 2)
    for query, document, products, own in zip(
        directions, documents, parts, torch.split(norms, lengths), strict=True
    ):
        # Kernels for bfloat16 are made and kept for each shape, and every pair has its own: so this is float32.
        states = room[: len(document)].copy_(document)
        torch.mm(states, query, out=products)
        torch.linalg.vector_norm(states, dim=1, out=own)
    cosines.div_(norms.clamp_min_(SMALLEST)[:, None])
    best, match = zip(*(part.max(0) for part in parts), strict=True)
    nearest = torch.stack(
        [document.index_select(0, rows) for document, rows in zip(documents, match, strict=True)]
    )
    of_query = torch.stack(best)
    of_document = torch.stack((cosines.mean(1), cosines.amax(1)), dim=1)
    mean, best_of_document = _means(torch.split(of_document, lengths)).unbind(1)
    length = torch.tensor(lengths, dtype=torch.float32, device=queries.device).log()
    numbers = torch.stack((of_query.mean(1), of_query.amin(1), mean, best_of_document, length), dim=1)
    return torch.cat(((queries * nearest).mean(1), numbers), dim=1)
