"""Keys and values of computed tokens are kept, so that the next token need not compute them again."""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueCache:
    """This class keeps the keys and values of one sequence in every layer.

    Args:
        depth: Number of layers.
        heads: Number of heads whose keys and values a layer keeps.
        size: Length of a key.
        capacity: The most tokens.
        dtype: Dtype of keys and values.
        device: Device of keys and values.
    """

    def __init__(
        self, depth: int, heads: int, size: int, capacity: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (1, heads, capacity, size)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(depth)]
        """For each layer ``[1, heads, capacity, size]``; as far as there are tokens yet, the rest is undefined."""
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(depth)]
        """The same of values."""
        self._lengths = [0] * depth

    @property
    def tokens(self) -> int:
        """The number of tokens that have been through all layers."""
        return self._lengths[-1]

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add the next tokens of a layer.

        Args:
            layer: Index of the layer, from 0.
            key: Keys of the tokens, ``[1, heads, T, size]``.
            value: Values of the tokens, of the same shape.

        Returns:
            Keys and values of all tokens of the layer so far, as views.
        """
        start = self._lengths[layer]
        end = self._lengths[layer] = start + key.shape[2]
        self.keys[layer][:, :, start:end] = key
        self.values[layer][:, :, start:end] = value
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]
