"""A lens is a linear map from the hidden states after a layer to an estimate of the final score.

The model's own head is blind in the first half of an encoder. A linear map that is fitted to the model's own final
scores, on any text and without judgements, sees from the token embeddings on. Its features are cheap beside a
layer: the scoring position's state, means over the tokens of query and document, their product, and in the first
layers how similar the tokens of the query are to those of the document (as in SEE, Busolin et al., SIGIR 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

from grating_core.models.cross_encoder import Shape

if TYPE_CHECKING:
    from grating_core.text.pairs import Segments

# Beyond this part of the layers, token similarities add nothing to what the states themselves say.
_SIMILARITY_PART = 6
_SIMILARITIES = 5


class Sequences(Protocol):
    """Sequences follow each other on the token axis; see :class:`grating_core.engine.ragged.Chunk`."""

    @property
    def prefix(self) -> int:
        """The number of tokens of the shared prefix before the first sequence here."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """The number of tokens of each sequence without the prefix."""

    @property
    def segments(self) -> tuple[Segments, ...]:
        """Where query and document are in each sequence, counted from the prefix's first token."""


Reader = Callable[[Tensor, Sequences], Tensor]
"""A function that gives a score, float32 ``[N]``, to each sequence in hidden states ``[1, T, D]``."""


class Provisional(Protocol):
    """This protocol reads provisional scores after each layer, and before the first."""

    def reader(self, number: int, prefix: int) -> Reader:
        """Return a reader of the scores of one request after a layer.

        Args:
            number: The layer; 0 stands for the token embeddings.
            prefix: Number of tokens that all sequences share. The reader must be called for their chunk first.
        """


class Features:
    """This class computes the features of a lens after one layer, chunk after chunk of a request.

    Args:
        number: The layer; 0 stands for the token embeddings.
        depth: Number of layers of the model.
        prefix: Number P of tokens that all sequences share. The first chunk must have them.
        pooling: The token that the head reads: ``"first"``, ``"last"``, or ``"mean"`` of all.
    """

    def __init__(self, number: int, depth: int, prefix: int, pooling: str) -> None:
        self._similarities = compares_tokens(number, depth)
        self._prefix = prefix
        self._pooling = pooling
        self._shared: Tensor | None = None  # states of the prefix

    def __call__(self, hidden: Tensor, sequences: Sequences) -> Tensor:
        """Compute the features of the sequences.

        Args:
            hidden: Hidden states, ``[1, T, D]`` or longer: the prefix, if the chunk has it, then the sequences.
            sequences: The division of the token axis.

        Returns:
            The features, float32 ``[N, F]`` with F of :func:`feature_count`.
        """
        if sequences.prefix:
            self._shared = hidden[0, : sequences.prefix].clone()
        own = hidden[0, sequences.prefix :]
        if not sequences.lengths:  # the prefix alone
            return own.new_empty(0, feature_count(own.shape[1], self._similarities), dtype=torch.float32)
        found = []
        start = 0
        for length, segments in zip(sequences.lengths, sequences.segments, strict=True):
            found.append(self._of_one(own[start : start + length], segments))
            start += length
        return torch.stack(found)

    def _of_one(self, states: Tensor, segments: Segments) -> Tensor:
        query, document = self._part(states, segments.query), self._part(states, segments.document)
        read = self._read(states).float()
        asked, told = _mean(query), _mean(document)
        features = [read, asked, told, asked * told]
        if self._similarities:
            features += _compared(query, document)
        return torch.cat(features)

    def _read(self, states: Tensor) -> Tensor:
        if self._pooling == "mean":
            return _mean(states)
        return states[-1 if self._pooling == "last" else 0]

    def _part(self, states: Tensor, span: tuple[int, int]) -> Tensor:
        """Return the states of a span, which may begin in the prefix."""
        start, stop = span
        own = states[max(0, start - self._prefix) : max(0, stop - self._prefix)]
        if start >= self._prefix or self._shared is None:
            return own
        return torch.cat((self._shared[start : min(stop, self._prefix)], own))


def compares_tokens(number: int, depth: int) -> bool:
    """Say whether the similarities of tokens belong to the features of a layer."""
    return number <= depth // _SIMILARITY_PART


def feature_count(width: int, similarities: bool) -> int:
    """Return the number F of features of a model of this width."""
    return 5 * width + _SIMILARITIES if similarities else 4 * width


def _mean(states: Tensor) -> Tensor:
    """Return the mean of states, float32 ``[D]``; zero where there are no tokens."""
    return states.sum(0, dtype=torch.float32) / max(1, len(states))


def _compared(query: Tensor, document: Tensor) -> list[Tensor]:
    """Compare query and document tokens: mean product with the most similar token, and means of cosines."""
    if not len(query) or not len(document):
        return [query.new_zeros(query.shape[1] + _SIMILARITIES, dtype=torch.float32)]
    # float32 is used because kernels for bfloat16 are made and kept for each shape, and every pair has its own.
    cosines = normalize(query.float(), dim=1) @ normalize(document.float(), dim=1).T
    best, match = cosines.max(1)
    product = (query.float() * document[match].float()).mean(0)
    length = torch.tensor(float(len(document)), device=query.device).log()
    return [
        product,
        torch.stack((best.mean(), best.min(), cosines.mean(), cosines.max(0).values.mean(), length)),
    ]


@dataclass(frozen=True)
class LayerMap:
    """A layer's map estimates the final score as a weighted sum of the layer's features.

    Attributes:
        weight: Weights of the features, float32 ``[F]``.
        bias: A float32 scalar, which makes no difference within a request.
    """

    weight: Tensor
    bias: Tensor


class Lens:
    """A lens estimates the final score after each layer but the last.

    Args:
        maps: The maps of layer 0, which stands for the token embeddings, to the last layer but one.
        pooling: The token that the model's head reads.
    """

    def __init__(self, maps: Sequence[LayerMap], pooling: str) -> None:
        self.maps = tuple(maps)
        self.pooling = pooling

    def check(self, shape: Shape) -> None:
        """Compare the lens with a model.

        Raises:
            ValueError: The lens is damaged, or for a model of another shape.
        """
        if (len(self.maps), self.pooling) != (shape.depth, shape.pooling):
            raise ValueError(
                f"it is for {len(self.maps)} layers and a head that reads {self.pooling!r}, and this model has "
                f"{shape.depth} and {shape.pooling!r}"
            )
        for number, layer in enumerate(self.maps):
            wanted = feature_count(shape.width, compares_tokens(number, shape.depth))
            if layer.weight.shape != (wanted,) or layer.bias.shape != ():
                raise ValueError(
                    f"layer {number} has weights {list(layer.weight.shape)} and a bias {list(layer.bias.shape)}, "
                    f"and not [{wanted}] and []"
                )
            for part in (layer.weight, layer.bias):
                if part.dtype != torch.float32 or not part.isfinite().all():
                    raise ValueError(f"layer {number} has numbers that are not finite float32")

    def to(self, device: torch.device) -> Lens:
        """Return the same lens on a device."""
        maps = [LayerMap(one.weight.to(device), one.bias.to(device)) for one in self.maps]
        return Lens(maps, self.pooling)

    def reader(self, number: int, prefix: int) -> Reader:
        """See :meth:`Provisional.reader`."""
        features = Features(number, len(self.maps), prefix, self.pooling)
        layer = self.maps[number]

        def estimate(hidden: Tensor, sequences: Sequences) -> Tensor:
            return features(hidden, sequences) @ layer.weight + layer.bias

        return estimate
