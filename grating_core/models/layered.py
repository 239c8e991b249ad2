"""A layered model lets the engine embed tokens and run one layer at a time, whatever the model's head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from grating_core.columns.companion import ColumnFile
from grating_core.memory.checkpoint import Checkpoint
from grating_core.memory.meter import Meter
from grating_core.memory.rows import RowCache
from grating_core.memory.streamer import Streamer
from grating_core.models.families import Family


@dataclass(frozen=True)
class Parts:
    """This class holds the parts of a layered model.

    Attributes:
        module: The transformers model in evaluation mode. Its weights are bound, except those of streamed layers.
        family: The description of the model's family.
        device: The device that holds the weights and computes.
        dtype: The compute dtype of the layers.
        meter: The counter of streamer, row cache and columns.
        streamer: Reader of the streamed layers' weights; None if no layer is streamed.
        rows: The row cache in the place of the embedding table; None if the table is resident.
        columns: The companion file with the columns of pruned MLPs; None if the MLPs are dense.
        checkpoint: The files that streamer and row cache read; None without streamer and row cache.
    """

    module: Any
    family: Family
    device: torch.device
    dtype: torch.dtype
    meter: Meter
    streamer: Streamer | None = None
    rows: RowCache | None = None
    columns: ColumnFile | None = None
    checkpoint: Checkpoint | None = None

    def close(self) -> None:
        """Stop reading, and close the files."""
        for part in (self.streamer, self.columns, self.checkpoint):
            if part is not None:
                part.close()


class LayeredModel:
    """This class drives a transformers model one layer at a time.

    Everything runs on a packed token axis without padding: hidden states are ``[1, T, D]`` in the compute
    dtype, where T counts the tokens of all sequences together. With all weights resident the object holds no
    state of a request, so several threads may use it at once; otherwise (:attr:`remembers`) only one may.

    Args:
        parts: The parts; :meth:`close` closes them.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.module = parts.module
        """The transformers model."""
        self._family = parts.family
        self._norm = self.module.get_submodule(parts.family.norm) if parts.family.norm else nn.Identity()
        self.layers: list[Any] = list(self.module.get_submodule(parts.family.layers))
        """The transformers layers, from the first to the last."""
        self.meter = parts.meter
        self.causal = parts.family.causal
        self.width: int = self.module.config.hidden_size
        self.device = parts.device
        self.dtype = parts.dtype
        self.work = work_per_token(self.layers[0], self.width, self.dtype, pruned=parts.columns is not None)

    @property
    def depth(self) -> int:
        """The number of layers."""
        return len(self.layers)

    @property
    def remembers(self) -> bool:
        """Whether one request changes what is in memory for the next, so that only one may run at a time."""
        parts = self._parts
        return any(part is not None for part in (parts.streamer, parts.rows, parts.columns))

    def prepare(self, input_ids: Tensor) -> None:
        """Read the embedding rows of a request's tokens, int64 ``[T]``, as far as there is room for them."""
        if self._parts.rows is not None:
            self._parts.rows.fetch(input_ids)

    @contextmanager
    def layer(self, number: int) -> Iterator[None]:
        """Provide the weights of a layer inside the ``with``. Ask for layers in rising order.

        Raises:
            FileError: The weights cannot be read from disk.
        """
        if self._parts.streamer is None or number not in self._parts.streamer:
            yield
            return
        with self._parts.streamer.layer(number) as weights:
            bind(self.module, weights)
            yield

    def rewind(self) -> None:
        """End a request, so that the first layers of the next request are read in advance."""
        if self._parts.streamer is not None:
            self._parts.streamer.rewind()

    def close(self) -> None:
        """Stop reading, and close the files."""
        self._parts.close()

    def embed(self, input_ids: Tensor, token_type_ids: Tensor, positions: Tensor) -> Tensor:
        """Return the hidden states before the first layer, ``[1, T, D]``, from int64 tensors ``[1, T]``."""
        return self._family.embed(self.module, input_ids, token_type_ids, positions)

    def run_layer(self, number: int, hidden: Tensor, positions: Tensor, *, attention: object) -> Tensor:
        """Put hidden states through one layer.

        Args:
            number: Layer number, from 1 to :attr:`depth`. Call this inside :meth:`layer`, which has its weights.
            hidden: Hidden states, ``[1, T, D]``.
            positions: Positions, int64 ``[1, T]``, counted from 0 within each sequence.
            attention: Argument of the model's attention function, such as the division of the token axis.

        Returns:
            Hidden states of the same shape.
        """
        layer = self.layers[number - 1]
        arguments = self._family.layer_arguments(self.module, layer, hidden, positions)
        # The argument has a name of our own. transformers passes unknown names on and uses known ones itself: a
        # release that began to know "cache" broke everything that generates.
        output: Tensor = layer(hidden, attention_mask=None, grating=attention, **arguments)
        return output


@contextmanager
def without_weights() -> Iterator[None]:
    """Give modules that this thread makes inside the ``with`` no memory for weights. Buffers have their values."""
    with torch.device("meta"), _RealBuffers():
        yield


class _RealBuffers(TorchFunctionMode):
    """This mode makes tensors that have values at once on the CPU. Weights stay empty, and are filled later."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # transformers calls torch.tensor([]) to ask whether to fill weights. The answer is no.
        asks = func is torch.tensor and bool(args) and isinstance(args[0], list) and not args[0]
        if func in _WITH_VALUES and not asks:
            kwargs.setdefault("device", "cpu")
        return func(*args, **kwargs)


_WITH_VALUES = {torch.arange, torch.full, torch.linspace, torch.ones, torch.tensor, torch.zeros}


def work_per_token(layer: nn.Module, width: int, dtype: torch.dtype, *, pruned: bool = False) -> int:
    """Return the most bytes of intermediate results that a layer has for one token.

    Args:
        layer: Any layer of the model.
        width: D, the width of the hidden states.
        dtype: Dtype of the results.
        pruned: Whether the layer's MLP computes from columns, which sums parts of the products in float32.
    """
    widest = max(part.out_features for part in layer.modules() if isinstance(part, nn.Linear))
    # Gated layers hold two products of that width and the gated product; others hold one before and one after.
    gated = any(name.endswith("gate_proj") for name, _ in layer.named_modules())
    # Hidden states, queries, keys and values come on top.
    if pruned:
        return (5 * widest + 8 * width) * dtype.itemsize + 4 * 4 * widest
    return ((3 if gated else 2) * widest + 8 * width) * dtype.itemsize


# The function is taken at import, because accelerate replaces it while another thread makes a model.
_register = nn.Module.register_parameter


def bind(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Make tensors the parameters of a module, by their dotted names, without a copy."""
    for name, weight in weights.items():
        owner, _, leaf = name.rpartition(".")
        _register(module.get_submodule(owner), leaf, nn.Parameter(weight, requires_grad=False))
