"""On a GPU the features of all sequences that a slice has whole are computed together, without a step for each.

On a CPU the way of :mod:`grating_core.kernels.features` is faster: these steps took 1.5 to 20 times as long there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from grating_core.kernels.features import SIMILARITIES, SMALLEST
from grating_core.kernels.operands import Texts
from grating_core.layers.sending import numbers_of, sent

Runs = Sequence[slice]
"""Runs of rows, one behind the other."""

_BLOCK = 32  # rows that are summed one after another
_PADDED = 16 * 1024  # tokens of documents that are compared at once, with what fills them up to the longest


def is_together(device: torch.device) -> bool:
    """Tell whether sequences are looked at together on a device. MPS lacks a function that this takes."""
    return device.type not in ("cpu", "mps")


def sums_of(states: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return the sum of each segment of states ``[T, D]``, float32 ``[N, D]``; zero for a segment without rows.

    Args:
        states: The segments, one behind the other.
        lengths: Number of rows of each of the N segments.
    """
    # A GPU goes through the rows of a segment one after another. Blocks first: it does many of them side by side.
    blocks = [min(_BLOCK, length - first) for length in lengths for first in range(0, length, _BLOCK)]
    return _sums(_sums(states.float(), blocks), [-(-length // _BLOCK) for length in lengths])


def _sums(states: Tensor, lengths: Sequence[int]) -> Tensor:
    if not len(states):
        return states.new_zeros(len(lengths), states.shape[1])
    counts = sent(torch.tensor(lengths), states.device)
    # Each sum is made of its own rows alone, in their order. Checking the lengths would wait for the device.
    return torch.segment_reduce(states, "sum", lengths=counts, axis=0, unsafe=True, initial=0)


def together_features(
    prefix: Tensor, states: Tensor, sequences: Sequence[Texts], pooling: str, *, similarities: bool
) -> Tensor:
    """See :func:`grating_core.kernels.features.features`."""
    states = torch.cat((prefix, states)) if len(prefix) else states
    own, queries, documents = zip(*(((one.own,), one.query, one.document) for one in sequences), strict=True)
    asked, told = _means(states, queries), _means(states, documents)
    features = [_read(states, own, pooling), asked, told, asked * told]
    asked_tokens = _length(queries[0])
    if similarities and asked_tokens:
        index = sent(_numbers(queries), states.device)
        tokens = states.index_select(0, index).float().view(len(queries), asked_tokens, -1)
        most = max(1, _PADDED // max(1, *map(_length, documents)))
        compared = [
            _compared(states, tokens[first : first + most], documents[first : first + most])
            for first in range(0, len(documents), most)
        ]
        features.append(torch.cat(compared))
    elif similarities:
        features.append(asked.new_zeros(len(asked), asked.shape[1] + SIMILARITIES))
    return torch.cat(features, dim=1)


def _length(runs: Runs) -> int:
    return sum(run.stop - run.start for run in runs)


def _numbers(groups: Sequence[Runs]) -> Tensor:
    return numbers_of([run for runs in groups for run in runs])


def _read(states: Tensor, sequences: Sequence[Runs], pooling: str) -> Tensor:
    """Return the state that the head reads of each sequence, float32 ``[N, D]``."""
    if pooling == "mean":
        return _means(states, sequences)
    places = [runs[-1].stop - 1 if pooling == "last" else runs[0].start for runs in sequences]
    return states.index_select(0, sent(torch.tensor(places), states.device)).float()


def _means(states: Tensor, groups: Sequence[Runs]) -> Tensor:
    """Return the mean of the rows of each group, float32 ``[N, D]``; zero where there are none."""
    lengths = [_length(runs) for runs in groups]
    rows = states.index_select(0, sent(_numbers(groups), states.device))
    counts = torch.tensor([[max(1, length)] for length in lengths], dtype=torch.float32)
    return sums_of(rows, lengths) / sent(counts, states.device)


def _compared(states: Tensor, queries: Tensor, documents: Sequence[Runs]) -> Tensor:
    """Compare the tokens of each query, float32 ``[N, Q, D]``, with those of its document."""
    device = states.device
    lengths = [_length(runs) for runs in documents]
    index = pad_sequence(list(torch.split(_numbers(documents), lengths)), batch_first=True)
    if not index.numel():
        index = index.new_zeros(len(documents), 1)
    place = torch.arange(index.shape[1], device=device)
    own = sent(torch.tensor(lengths), device)[:, None]
    # What fills a document up is a state of zeros, to which nothing is similar. An empty document has one of them.
    told = states[sent(index, device)].float().masked_fill_((place >= own)[:, :, None], 0)
    fill = (place >= own.clamp(min=1))[:, :, None]
    cosines = told @ normalize(queries, dim=2).transpose(1, 2)
    cosines.div_(torch.linalg.vector_norm(told, dim=2).clamp_min_(SMALLEST)[:, :, None])
    best, match = cosines.masked_fill(fill, -torch.inf).max(1)
    nearest = told.gather(1, match[:, :, None].expand(-1, -1, told.shape[2]))
    counts = own.clamp(min=1).float()[:, 0]
    mean = cosines.mean(2).sum(1) / counts  # fill has cosines of zero
    best_of_document = cosines.amax(2).sum(1) / counts
    numbers = torch.stack((best.mean(1), best.amin(1), mean, best_of_document, counts.log()), dim=1)
    return torch.cat(((queries * nearest).mean(1), numbers), dim=1)
