"""A sample of tokens goes through the layers of a language model, and tells how large the inputs of products are.

Where inputs are large, the error of a rounded weight counts more. Which inputs are large is mostly a matter of the
model, not of the text: tokens drawn at random tell it about as well as texts do, so quantising needs no text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from grating_core.kernels.operands import Seen, Span
from grating_core.layers import layer as steps
from grating_core.layers.attention import ragged_attention
from grating_core.layers.linear import Weights, linear
from grating_core.layers.rotary import Angles
from grating_core.layers.spec import LayerSpec, Role, Rotary
from grating_core.models.family import ModelSpec

_SEQUENCES = 4
_LENGTH = 128  # tokens of a sequence, if the model takes so many; more tell no more
_SEED = 0
_PRODUCTS = 28_000_000  # bytes that torch's own kernels keep


class Sample:
    """A sample holds the hidden states of its sequences before the next layer.

    Args:
        hidden: The hidden states before the first layer, ``[sequences, T, D]``; they are changed.
        angles: The angles at the positions of a sequence, for each kind of rotary positions.
    """

    def __init__(self, hidden: Tensor, angles: Mapping[Rotary, Angles]) -> None:
        self._hidden = hidden
        self._angles = angles

    @torch.inference_mode()
    def importance(self, spec: LayerSpec, weights: Weights) -> dict[Role, Tensor]:
        """Go through the next layer, and return the mean squares of the inputs of its products.

        Args:
            spec: The layer's spec.
            weights: The layer's weights by role, in any floating dtype.

        Returns:
            The mean square of each entry of the input, float32 ``[in]``, by role.
        """
        converted = _Converted(weights, self._hidden.dtype)
        found: dict[Role, Tensor] = {}
        for hidden in self._hidden:
            hidden.copy_(self._through(spec, converted, hidden, found))
        return {role: total / self._hidden[..., 0].numel() for role, total in found.items()}

    def _through(self, spec: LayerSpec, weights: Weights, hidden: Tensor, found: dict[Role, Tensor]) -> Tensor:
        """Return the hidden states ``[T, D]`` of a sequence after a layer, and add squares of inputs."""

        def see(states: Tensor, *roles: Role) -> None:
            squares = states.float().square().sum(0)
            for role in roles:
                found[role] = found[role] + squares if role in found else squares

        def mlp(states: Tensor, weights: Weights) -> Tensor:
            see(states, "gate", "up")
            inner = steps.inner(spec, weights, states)
            see(inner, "down")
            return linear(inner, weights, "down")

        angles, tokens = None if spec.rotary is None else self._angles[spec.rotary], len(hidden)
        states = steps.prepared(spec, weights, hidden)
        see(states, "query", "key", "value")
        seen = Seen(*steps.keys_and_values(spec, weights, states, angles))
        query = steps.queries(spec, weights, states, angles)
        attended = ragged_attention(spec, query, seen, [Span(0, tokens, 0, tokens, 0)])
        see(attended.flatten(1), "output")
        return steps.finished(spec, weights, hidden, attended, mlp)


class _Converted(Mapping[str, Tensor]):
    """These weights are converted to a dtype whenever they are asked for, so that one at a time is in memory."""

    def __init__(self, weights: Weights, dtype: torch.dtype) -> None:
        self._weights = weights
        self._dtype = dtype

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[name].to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def draw_tokens(spec: ModelSpec) -> Tensor:
    """Return the tokens of a model's sample, int64 ``[sequences, T]``. They are always the same."""
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randint(spec.vocabulary, (_SEQUENCES, min(_LENGTH, spec.window)), generator=generator)


def sample_bytes(spec: ModelSpec, states: torch.dtype) -> int:
    """Return the bytes that a sample takes in memory while it goes through a layer, in this dtype of states."""
    layer, length = spec.layers[0], min(_LENGTH, spec.window)
    own, shared = layer.heads * layer.head_size, layer.key_heads * layer.head_size
    widest = max(layer.inner, own)
    matrix = widest * layer.width * states.itemsize
    hidden = _SEQUENCES * length * spec.width * states.itemsize
    work = length * (states.itemsize * (2 * widest + 2 * own + 2 * shared + 4 * layer.width) + 8 * widest)
    return _PRODUCTS + matrix + hidden + work
