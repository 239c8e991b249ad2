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
    asking = torch.stack(list(queries)).float()
    asked, told = asking.sum(1) / max(1, asking.shape[1]), _means(documents)
    features = [_read(sequences, pooling), asked, told, asked * told]
    if similarities:
        there = [number for number, document in enumerate(documents) if len(document)]
        found = asking.new_zeros(len(documents), asking.shape[2] + SIMILARITIES)
        if there and asking.shape[1]:
            found[there] = _compared(asking[there], [documents[number] for number in there])
        features.append(found)
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
    device, lengths = queries.device, [len(document) for document in documents]
    cosines = torch.empty(sum(lengths), queries.shape[1], device=device)
    norms = torch.empty(sum(lengths), device=device)
    parts = torch.split(cosines, lengths)
    directions = normalize(queries, dim=2).transpose(1, 2)
    for query, document, products, sizes in zip(
        directions, documents, parts, torch.split(norms, lengths), strict=True
    ):
        # Kernels for bfloat16 are made and kept for each shape, and every pair has its own: so this is float32.
        states = document.float()
        torch.mm(states, query, out=products)
        torch.linalg.vector_norm(states, dim=1, out=sizes)
    cosines.div_(norms.clamp_min_(SMALLEST)[:, None])
    of_query = [part.max(0) for part in parts]
    best = torch.stack([values for values, _ in of_query])
    nearest = torch.stack([document[match] for document, (_, match) in zip(documents, of_query, strict=True)])
    of_document = _means(torch.split(torch.stack((cosines.mean(1), cosines.amax(1)), dim=1), lengths))
    logarithms = torch.tensor(lengths, dtype=torch.float32, device=device).log()
    numbers = (best.mean(1), best.amin(1), *of_document.unbind(1), logarithms)
    return torch.cat(((queries * nearest).mean(1), torch.stack(numbers, dim=1)), dim=1)
