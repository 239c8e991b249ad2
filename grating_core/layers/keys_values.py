"""Keys and values of computed tokens are kept, so that later tokens can attend to them."""

from __future__ import annotations

import torch
from torch import Tensor

from grating_core.kernels.packing import quantized
from grating_core.kernels.token import Memory
from grating_core.layers.spec import LayerSpec


class KeysValues:
    """This class keeps the keys and values of one sequence in one layer.

    Args:
        spec: The layer's spec.
        capacity: The most tokens.
        dtype: Dtype of the keys and values that are given and asked for.
        device: Device of keys and values.
        bits: 8 to keep them in 8 bits, with a scale for each token and head; None to keep them as they are.
    """

    def __init__(
        self,
        spec: LayerSpec,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        bits: int | None = None,
    ) -> None:
        shape = (2, capacity, spec.key_heads, spec.head_size)
        self._dtype = dtype
        self._kept = torch.empty(shape, dtype=dtype if bits is None else torch.int8, device=device)
        self._scale = None if bits is None else torch.empty(shape[:3], device=device)
        self.tokens = 0
        """The number of tokens whose keys and values are here."""

    def extend(self, key: Tensor, value: Tensor) -> None:
        """Add the keys and values of the next T tokens, ``[T, key heads, head size]`` each."""
        start, self.tokens = self.tokens, self.tokens + len(key)
        for which, states in enumerate((key, value)):
            if self._scale is not None:
                states, self._scale[which, start : self.tokens] = quantized(states)
            self._kept[which, start : self.tokens] = states

    @property
    def key(self) -> Tensor:
        """The keys of all tokens so far, ``[tokens, key heads, head size]``."""
        return self._asked(0)

    @property
    def value(self) -> Tensor:
        """The values of all tokens so far, ``[tokens, key heads, head size]``."""
        return self._asked(1)

    def _asked(self, which: int) -> Tensor:
        kept = self._kept[which, : self.tokens]
        if self._scale is None:
            return kept
        return (kept * self._scale[which, : self.tokens, :, None]).to(self._dtype)

    @property
    def memory(self) -> Memory:
        """The keys and values of as many tokens as there is room for."""
        scales = (None, None) if self._scale is None else self._scale.unbind()
        return Memory(self._kept[0], self._kept[1], *scales)


def bytes_of_keys_values(spec: LayerSpec, depth: int, tokens: int, dtype: torch.dtype, bits: int | None) -> int:
    """Return what the keys and values of so many tokens take in memory.

    Args:
        spec: The spec of a layer.
        depth: Number of layers.
        tokens: Number of tokens.
        dtype: Dtype of the keys and values that are given and asked for.
        bits: See :class:`KeysValues`.
    """
    heads = tokens * spec.key_heads
    if bits is None:
        return 2 * depth * heads * spec.head_size * dtype.itemsize
    # A prompt reads those of one layer as they were, through float32.
    return 2 * depth * heads * (spec.head_size + 4) + heads * spec.head_size * (2 * dtype.itemsize + 4)
