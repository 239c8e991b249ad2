"""A sequence that does not fit into a slice comes part by part; its features are gathered as it comes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from grating_core.kernels.features import SIMILARITIES, SMALLEST
from grating_core.text.pairs import Segments, Span

_BLOCK = 256  # tokens that are looked at together; float32 copies are no longer than this


class PartwiseFeatures:
    """This class gathers the features of one sequence.

    Args:
        segments: Where query and document are in the sequence, the prefix included. They have no token in common.
        prefix: Hidden states of the tokens that the sequence shares with others, ``[P, D]``; P may be 0.
        length: Number of the sequence's own tokens.
        pooling: The token that the head reads: ``"first"``, ``"last"``, or ``"mean"`` of all own tokens.
        similarities: Whether the tokens of query and document are compared.
    """

    def __init__(
        self, segments: Segments, prefix: Tensor, length: int, pooling: str, *, similarities: bool
    ) -> None:
        self._texts = segments.query, segments.document
        self._length = length
        self._pooling = pooling
        self._compared = _Compared(segments, prefix) if similarities else None
        self._read = torch.zeros(prefix.shape[1], device=prefix.device)
        self._sums = torch.zeros(2, prefix.shape[1], device=prefix.device)
        self._seen = 0
        for block in torch.split(prefix, _BLOCK):
            self._see_texts(block)
        self._first = self._seen

    def see(self, states: Tensor) -> None:
        """Take the hidden states ``[T, D]`` of the next tokens."""
        for block in torch.split(states, _BLOCK):
            if self._pooling == "mean":
                self._read += block.sum(0, dtype=torch.float32) / self._length
            elif self._pooling == "last":
                self._read.copy_(block[-1])
            elif self._seen == self._first:
                self._read.copy_(block[0])
            self._see_texts(block)

    def _see_texts(self, block: Tensor) -> None:
        for total, span in zip(self._sums, self._texts, strict=True):
            total += _within(block, self._seen, span).sum(0, dtype=torch.float32)
        if self._compared is not None:
            self._compared.see(block, self._seen)
        self._seen += len(block)

    def values(self) -> Tensor:
        """Return the features after the last part, float32 ``[F]``."""
        asked, told = (
            total / max(1, span[1] - span[0]) for total, span in zip(self._sums, self._texts, strict=True)
        )
        features = [self._read, asked, told, asked * told]
        if self._compared is not None:
            features.append(self._compared.values())
        return torch.cat(features)


class _Tokens(NamedTuple):
    """Consecutive tokens of a text: the number of the first in the text, and hidden states ``[T, D]``."""

    start: int
    states: Tensor


class _Compared:
    """This class compares the tokens of two texts, of which one is kept until the other has come.

    Args:
        segments: Where the two texts are.
        like: A tensor ``[..., D]`` on the device and of the width of the hidden states.
    """

    def __init__(self, segments: Segments, like: Tensor) -> None:
        self._texts = segments.query, segments.document
        self._query_first = segments.query < segments.document
        self._kept: list[_Tokens] = []
        asked, told = (stop - start for start, stop in self._texts)
        device = like.device
        self._best = torch.full((asked,), -torch.inf, device=device)
        self._products = torch.zeros(asked, like.shape[-1], device=device)
        self._best_of_document = torch.full((told,), -torch.inf, device=device)
        self._sum = torch.zeros((), device=device)

    def see(self, block: Tensor, start: int) -> None:
        """Compare the next tokens of the sequence, of which the first is at ``start``."""
        texts = [_Tokens(max(0, start - span[0]), _within(block, start, span)) for span in self._texts]
        earlier, later = texts if self._query_first else texts[::-1]
        if len(earlier.states):
            self._kept.append(earlier._replace(states=earlier.states.clone()))  # what was seen will be overwritten
        if len(later.states):
            for kept in self._kept:
                self._compare(*((kept, later) if self._query_first else (later, kept)))

    def _compare(self, query: _Tokens, document: _Tokens) -> None:
        asked, told = query.states.float(), document.states.float()
        cosines = (asked @ told.T).div_(_norms(asked)[:, None]).div_(_norms(told))
        best, match = cosines.max(1)
        rows = slice(query.start, query.start + len(asked))
        better = (best > self._best[rows])[:, None]
        self._products[rows] = torch.where(better, asked * told[match], self._products[rows])
        self._best[rows] = torch.maximum(best, self._best[rows])
        rows = slice(document.start, document.start + len(told))
        self._best_of_document[rows] = torch.maximum(cosines.amax(0), self._best_of_document[rows])
        self._sum += cosines.sum()

    def values(self) -> Tensor:
        """Return the similarities, float32 ``[D + 5]``; zero where a text has no tokens."""
        asked, told = len(self._best), len(self._best_of_document)
        if not asked or not told:
            return self._products.new_zeros(self._products.shape[1] + SIMILARITIES)
        length = torch.full((), math.log(told), device=self._sum.device)
        mean, best_of_document = self._sum / (asked * told), self._best_of_document.mean()
        numbers = torch.stack((self._best.mean(), self._best.min(), mean, best_of_document, length))
        return torch.cat((self._products.mean(0), numbers))


def _within(block: Tensor, start: int, span: Span) -> Tensor:
    """Return the states of a block that begins at ``start`` whose tokens are in a span."""
    first, last = (max(0, edge - start) for edge in span)
    return block[first:last]


def _norms(states: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(states, dim=1)
    return norms.clamp_min_(SMALLEST)
