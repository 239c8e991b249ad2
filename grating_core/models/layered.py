"""A loaded model as the engine sees it, whatever its head: embed, run one layer."""

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
    """What a layered model is made of.

    Attributes:
        module: The transformers model in evaluation mode; weights bound, except those of streamed layers.
        family: The description that fits it.
        device: The device that the weights are on and that computes.
        dtype: The compute dtype of the layers.
        meter: The counter of streamer, row cache and columns.
        streamer: What brings the weights of the layers that are not bound; None if all are.
        rows: What stands in for the embedding table; None if the table is resident.
        columns: What the columns of pruned MLPs are read from; None if the MLPs are dense.
        checkpoint: What streamer and row cache read; None if neither is there.
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
        """Stop reading, and close what was read."""
        for part in (self.streamer, self.columns, self.checkpoint):
            if part is not None:
                part.close()


class LayeredModel:
    """A transformers model that is driven one layer at a time.

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
        """Number of layers."""
        return len(self.layers)

    @property
    def remembers(self) -> bool:
        """Whether one request changes what is in memory for the next, so that only one may run at a time."""
        parts = self._parts
        return any(part is not None for part in (parts.streamer, parts.rows, parts.columns))

    def prepare(self, input_ids: Tensor) -> None:
        """Have the embedding rows of a request's tokens, int64 ``[T]``, as far as there is room for them."""
        if self._parts.rows is not None:
            self._parts.rows.fetch(input_ids)

    @contextmanager
    def layer(self, number: int) -> Iterator[None]:
        """Have the weights of a layer inside the ``with``; layers are asked for in rising order.

        Raises:
            FileError: They cannot be read from disk.
        """
        if self._parts.streamer is None or number not in self._parts.streamer:
            yield
            return
        with self._parts.streamer.layer(number) as weights:
            bind(self.module, weights)
            yield

    def rewind(self) -> None:
        """Say that a request is over, so that what the next one begins with is read meanwhile."""
        if self._parts.streamer is not None:
            self._parts.streamer.rewind()

    def close(self) -> None:
        """Stop reading, and close what was read."""
        self._parts.close()

    def embed(self, input_ids: Tensor, token_type_ids: Tensor, positions: Tensor) -> Tensor:
        """Hidden states before the first layer, ``[1, T, D]``, from int64 tensors ``[1, T]``."""
        return self._family.embed(self.module, input_ids, token_type_ids, positions)

    def run_layer(self, number: int, hidden: Tensor, positions: Tensor, *, attention: object) -> Tensor:
        """Put hidden states through one layer.

        Args:
            number: Layer number, from 1 to :attr:`depth`; its weights are there (:meth:`layer`).
            hidden: ``[1, T, D]``.
            positions: int64 ``[1, T]``, counted from 0 within each sequence.
            attention: What the attention function that the model was built with is told, such as how the token
                axis divides.

        Returns:
            Hidden states of the same shape.
        """
        layer = self.layers[number - 1]
        arguments = self._family.layer_arguments(self.module, layer, hidden, positions)
        # Under one name of our own: transformers hands on what it does not know, and takes for itself what it
        # does. A release that began to know "cache" broke everything that generates.
        output: Tensor = layer(hidden, attention_mask=None, grating=attention, **arguments)
        return output


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules that this thread makes meanwhile take no memory for weights; their buffers have their values."""
    with torch.device("meta"), _RealBuffers():
        yield


class _RealBuffers(TorchFunctionMode):
    """Has tensors that are made with their values on the CPU. Weights are made empty, and filled afterwards."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # By torch.tensor([]) transformers asks whether weights are to be filled at all; they are not.
        asks = func is torch.tensor and bool(args) and isinstance(args[0], list) and not args[0]
        if func in _WITH_VALUES and not asks:
            kwargs.setdefault("device", "cpu")
        return func(*args, **kwargs)


_WITH_VALUES = {torch.arange, torch.full, torch.linspace, torch.ones, torch.tensor, torch.zeros}


def work_per_token(layer: nn.Module, width: int, dtype: torch.dtype, *, pruned: bool = False) -> int:
    """Bytes of intermediate results that a layer has for one token, at most.

    Args:
        layer: One of them.
        width: D.
        dtype: Of the results.
        pruned: Whether its MLP computes from columns, which sums parts of the products in float32.
    """
    widest = max(part.out_features for part in layer.modules() if isinstance(part, nn.Linear))
    # Gated layers hold two products of that width and what becomes of them; others one, before and after.
    gated = any(name.endswith("gate_proj") for name, _ in layer.named_modules())
    # Beside them hidden states, queries, keys and values.
    if pruned:
        return (5 * widest + 8 * width) * dtype.itemsize + 4 * 4 * widest
    return ((3 if gated else 2) * widest + 8 * width) * dtype.itemsize


# Taken now: accelerate replaces it while another thread makes a model, and would lose the weight.
_register = nn.Module.register_parameter


def bind(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Make tensors the parameters of a module, by their dotted names. Nothing is copied."""
    for name, weight in weights.items():
        owner, _, leaf = name.rpartition(".")
        _register(module.get_submodule(owner), leaf, nn.Parameter(weight, requires_grad=False))
