"""What a lens looks at in sequences, in torch: what the compiled kernel is tested against.

What is as long as a document is looked at document by document, because it then stays in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from grating_core.kernels.operands import Texts

SIMILARITIES = 5
"""The number of similarities beside the product with the most similar token."""

SMALLEST = 1e-12
"""The least norm of a state that cosines are computed with."""

_TOGETHER = 256  # tokens that are copied at once, at most, to look at several sequences together


def features(
    prefix: Tensor, states: Tensor, sequences: Sequence[Texts], pooling: str, *, similarities: bool
) -> Tensor:
    """Compute the features of sequences; :class:`grating_core.lens.features.Features` says what they are.

    Args:
        prefix: Hidden states that the sequences share, ``[P, D]``; P may be 0.
        states: Hidden states of the sequences' own tokens, ``[T, D]``.
        sequences: Where the N sequences are, at least one. All queries have Q tokens.
        pooling: The token that the head reads: ``"first"``, ``"last"``, or ``"mean"`` of all own tokens.
        similarities: Whether the tokens of query and document are compared.

    Returns:
        The features, float32 ``[N, 4 D]``, or ``[N, 5 D + 5]`` with similarities. None depends on the others.
    """
    most = max(1, _TOGETHER // max(1, max(_copied(len(prefix), one) for one in sequences)))
    some = [sequences[first : first + most] for first in range(0, len(sequences), most)]
    return torch.cat([_features(prefix, states, few, pooling, similarities=similarities) for few in some])


def _copied(shared: int, texts: Texts) -> int:
    """Return how many tokens are copied for a sequence: the query's, and those of the document in the prefix."""
    runs = (*texts.query, *(run for run in texts.document if run.start < shared))
    return sum(int(run.stop - run.start) for run in runs)


def _features(
    prefix: Tensor, states: Tensor, sequences: Sequence[Texts], pooling: str, *, similarities: bool
) -> Tensor:
    own, queries, documents = (
        [_states(prefix, states, runs) for runs in texts]
        for texts in zip(*(((one.own,), one.query, one.document) for one in sequences), strict=True)
    )
    asked, told = _means(queries), _means(documents)
    found = [_read(own, pooling), asked, told, asked * told]
    if similarities and len(queries[0]):
        # To a state of zeros nothing is similar.
        some = [one if len(one) else one.new_zeros(1, one.shape[1]) for one in documents]
        found.append(_compared(torch.stack(queries).float(), some))
    elif similarities:
        found.append(asked.new_zeros(len(asked), asked.shape[1] + SIMILARITIES))
    return torch.cat(found, dim=1)


def _states(prefix: Tensor, states: Tensor, runs: Sequence[slice]) -> Tensor:
    """Return the rows of some runs, ``[L, D]``."""
    shared = len(prefix)
    found = [prefix[run] if run.start < shared else states[run.start - shared : run.stop - shared] for run in runs]
    return found[0] if len(found) == 1 else torch.cat((states[:0], *found))


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
