"""Keys and values of computed tokens are kept, so that later tokens can attend to them."""

from __future__ import annotations

import torch
from torch import Tensor

from grating_core.kernels.token import Memory
from grating_core.layers.spec import LayerSpec


class KeysValues:
    """This class keeps the keys and values of one sequence in one layer.

    Args:
        spec: The layer's spec.
        capacity: The most tokens.
        dtype: Dtype of keys and values.
        device: Device of keys and values.
    """

    def __init__(self, spec: LayerSpec, capacity: int, *, dtype: torch.dtype, device: torch.device) -> None:
        shape = (2, capacity, spec.key_heads, spec.head_size)
        self._kept = torch.empty(shape, dtype=dtype, device=device)
        self.tokens = 0
        """The number of tokens whose keys and values are here."""

    def extend(self, key: Tensor, value: Tensor) -> None:
        """Add the keys and values of the next T tokens, ``[T, key heads, head size]`` each."""
        start, self.tokens = self.tokens, self.tokens + len(key)
        self._kept[0, start : self.tokens] = key
        self._kept[1, start : self.tokens] = value

    @property
    def key(self) -> Tensor:
        """The keys of all tokens so far, ``[tokens, key heads, head size]``."""
        return self._kept[0, : self.tokens]

    @property
    def value(self) -> Tensor:
        """The values of all tokens so far, ``[tokens, key heads, head size]``."""
        return self._kept[1, : self.tokens]

    @property
    def memory(self) -> Memory:
        """The keys and values of as many tokens as there is room for."""
        return Memory(self._kept[0], self._kept[1])
