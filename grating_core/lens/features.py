"""A lens is a linear map from the hidden states after a layer to an estimate of the final score.

The model's own head is blind in the first half of an encoder. A linear map that is fitted to the model's own final
scores, on any text and without judgements, sees from the token embeddings on. Its features are cheap beside a
layer: the scoring position's state, means over the tokens of query and document, their product, and in the first
layers how similar the tokens of the query are to those of the document (as in SEE, Busolin et al., SIGIR 2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from grating_core.kernels.choice import kernels
from grating_core.kernels.features import SIMILARITIES, features
from grating_core.kernels.operands import Texts
from grating_core.lens.partwise import PartwiseFeatures
from grating_core.lens.together import is_together, together_features
from grating_core.models.cross_encoder import Shape
from grating_core.text.pairs import Segments

# Beyond this part of the layers, token similarities add nothing to what the states themselves say.
_SIMILARITY_PART = 6
# A look took so many layers of width 1, without similarities and with them, where it was measured: at this width.
_LOOK, _LOOK_WITH_SIMILARITIES, _MEASURED = 12.0, 60.0, 384
_ALONE = 1024  # tokens that are copied at once, at most, to look at one whole sequence


class Piece(Protocol):
    """A piece is one sequence of a pass: a document's window, or the prefix that a request's sequences share."""

    @property
    def length(self) -> int:
        """The number of its own tokens."""

    @property
    def before(self) -> int:
        """The number of tokens of the request's prefix before them; 0 without one, and for the prefix itself."""

    @property
    def segments(self) -> Segments | None:
        """The places of query and document, counted from the prefix's first token; None for a prefix."""


class Part(Protocol):
    """A part is what a slice has of a piece; see :class:`grating_core.engine.ragged.Part`."""

    @property
    def piece(self) -> Piece:
        """The piece."""

    @property
    def rows(self) -> slice:
        """The place of the part's tokens in the slice."""

    @property
    def start(self) -> int:
        """The number of the part's first token in the piece."""

    @property
    def texts(self) -> Texts | None:
        """Where the texts are, see :func:`texts_of`."""


class Reader(Protocol):
    """A reader gives a score to each sequence of one request, by the hidden states after one layer."""

    def see(self, states: Tensor, parts: Sequence[Part]) -> None:
        """Take what a slice has of the request. The slices come in order.

        Args:
            states: Hidden states of the slice, ``[T, D]``; they may change after the call.
            parts: The request's parts in the slice, one directly behind the other. The prefix comes first. A piece
                that is cut comes to its end before the next begins.
        """

    def scores(self) -> Tensor:
        """Return the scores after the last slice, float32 ``[N]``: one for each piece but the prefix, in order."""


class Provisional(Protocol):
    """This protocol reads provisional scores after each layer, and before the first."""

    def reader(self, number: int) -> Reader:
        """Return a fresh reader for one request after a layer; layer 0 stands for the token embeddings."""


class Features:
    """This class computes the features of a lens for the sequences of one request, after one layer.

    The features of a sequence are

    * the state that the head reads, ``[D]``;
    * the mean over query tokens, the mean over document tokens, and the product of the two, ``[D]`` each;
    * in the first layers the mean product of each query token and the document token most similar to it, ``[D]``,
      and five numbers: the mean and the least of each query token's best cosine, the mean of all cosines, the mean
      of each document token's best cosine, and the logarithm of the document's length.

    Where a text has no tokens, its mean and all similarities are zero.

    Args:
        number: The layer; 0 stands for the token embeddings.
        depth: Number of layers of the model.
        pooling: The token that the head reads: ``"first"``, ``"last"``, or ``"mean"`` of all but the prefix.
    """

    def __init__(self, number: int, depth: int, pooling: str) -> None:
        self._similarities = compares_tokens(number, depth)
        self._pooling = pooling
        self._prefix: Tensor | None = None
        self._partwise: PartwiseFeatures | None = None  # of a sequence that has not come to its end

    def see(self, states: Tensor, parts: Sequence[Part]) -> Tensor:
        """Take what a slice has of the request, see :meth:`Reader.see`.

        Returns:
            The features of the sequences that end here, float32 ``[N, F]`` with F of :func:`feature_count`.
        """
        if self._prefix is None:
            self._prefix = states[:0]
        found = list[Tensor]()
        for asked, some in groupby(parts, _query_length):
            if asked is None:
                for part in some:
                    found += self._of_part(self._prefix, states[part.rows], part)
            else:
                texts = [part.texts for part in some if part.texts is not None]
                found.append(self._of_whole(self._prefix, states, texts))
        if len(found) == 1:
            return found[0]
        none = states.new_empty(0, feature_count(states.shape[1], self._similarities), dtype=torch.float32)
        return torch.cat((none, *found))

    def _of_whole(self, prefix: Tensor, states: Tensor, texts: list[Texts]) -> Tensor:
        compiled = kernels().features
        if is_together(states.device):
            look = together_features
        else:
            look = compiled if compiled is not None and kernels().has(states.dtype) else features
        return look(prefix, states, texts, self._pooling, similarities=self._similarities)

    def _of_part(self, prefix: Tensor, states: Tensor, part: Part) -> list[Tensor]:
        piece = part.piece
        if piece.segments is None:
            self._prefix = torch.cat((prefix, states))
            return []
        if part.start == 0:
            self._partwise = PartwiseFeatures(
                piece.segments, prefix, piece.length, self._pooling, similarities=self._similarities
            )
        assert self._partwise is not None, "a piece came without its beginning"
        self._partwise.see(states)
        if part.start + len(states) < piece.length:
            return []
        values, self._partwise = self._partwise.values(), None
        return [values[None]]


def _query_length(part: Part) -> int | None:
    """Return the number of query tokens of a sequence that is looked at as a whole; None for other parts."""
    texts = part.texts
    return None if texts is None else texts.query_stop - texts.query_start


def texts_of(part: Part) -> Texts | None:
    """Return where a sequence and its texts are.

    Args:
        part: What a slice has of a piece.

    Returns:
        The places; None for the prefix, and for what is looked at part by part: a sequence that the slice does not
        have whole, or of which too much would be copied.
    """
    before, segments = part.piece.before, part.piece.segments
    if segments is None or part.rows.stop - part.rows.start < part.piece.length:
        return None
    (asked, end), (told, last) = segments.query, segments.document
    if end - asked + max(0, min(last, before) - told) > _ALONE:
        return None
    return Texts(part.rows.start, part.piece.length, asked, end, told, last, before)


def compares_tokens(number: int, depth: int) -> bool:
    """Say whether the similarities of tokens belong to the features of a layer."""
    return number <= depth // _SIMILARITY_PART


def look_costs(shape: Shape) -> list[float]:
    """Return what a look costs after each layer from 0, as a share of a layer's time.

    A look goes through the states once, or compares them with the query's few tokens. A layer multiplies them with
    matrices, so its work grows with the width as well, where it is wide.
    """
    costs = (
        _LOOK_WITH_SIMILARITIES if compares_tokens(number, shape.depth) else _LOOK for number in range(shape.depth)
    )
    return [cost / max(shape.width, _MEASURED) for cost in costs]


def feature_count(width: int, similarities: bool) -> int:
    """Return the number F of features of a model of this width."""
    return 5 * width + SIMILARITIES if similarities else 4 * width


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

    def reader(self, number: int) -> Reader:
        """See :meth:`Provisional.reader`."""
        return _Estimates(Features(number, len(self.maps), self.pooling), self.maps[number])


class _Estimates:
    """Estimates are what a lens reads after one layer; see :class:`Reader`.

    Args:
        features: The features of the request.
        layer: The layer's map.
    """

    def __init__(self, features: Features, layer: LayerMap) -> None:
        self._features = features
        self._layer = layer
        self._found: list[Tensor] = []

    def see(self, states: Tensor, parts: Sequence[Part]) -> None:
        """See :meth:`Reader.see`."""
        self._found.append(self._features.see(states, parts) @ self._layer.weight)

    def scores(self) -> Tensor:
        """See :meth:`Reader.scores`."""
        found = self._found[0] if len(self._found) == 1 else torch.cat(self._found)
        return found + self._layer.bias
