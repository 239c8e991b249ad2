"""Keys and values of what has been computed, so that the next token need not compute it again."""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueCache:
    """Keys and values of one sequence in every layer, with room for a number of tokens that is known beforehand.

    Args:
        depth: Number of layers.
        heads: Of how many heads a layer keeps keys and values.
        size: Length of a key.
        capacity: Most tokens.
        dtype: Of keys and values.
        device: Where they are.
    """

    def __init__(
        self, depth: int, heads: int, size: int, capacity: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (1, heads, capacity, size)
        self._keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(depth)]
        self._values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(depth)]
        self._lengths = [0] * depth

    @property
    def tokens(self) -> int:
        """How many tokens have been through all layers."""
        return self._lengths[-1]

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add the next tokens of a layer.

        Args:
            layer: Its index, from 0.
            key: ``[1, heads, T, size]``.
            value: The same.

        Returns:
            Keys and values of all the layer's tokens so far, as views.
        """
        start = self._lengths[layer]
        end = self._lengths[layer] = start + key.shape[2]
        self._keys[layer][:, :, start:end] = key
        self._values[layer][:, :, start:end] = value
        return self._keys[layer][:, :, :end], self._values[layer][:, :, :end]
