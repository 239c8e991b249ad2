"""A language model is a layered model whose head predicts the next token; here is its form on disk as well."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grating_core.columns.companion import ColumnFile
from grating_core.columns.install import MlpPruning, column_sizes, install, open_columns, staging_bytes
from grating_core.errors import FileError, ModelNotFoundError, UnsupportedModelError
from grating_core.files.places import cache_directory
from grating_core.layers.layer import Mlp
from grating_core.layers.spec import LayerSpec, Norm
from grating_core.lifetime import closed_on_error
from grating_core.memory.checkpoint import aligned_buffer
from grating_core.memory.group import PIECE
from grating_core.memory.plan import MemoryPlan, ModelSizes, make_generation_plan
from grating_core.models.adapter import Adapter
from grating_core.models.directory import end_tokens
from grating_core.models.families import FAMILIES
from grating_core.models.identity import fingerprint
from grating_core.models.layered import LayeredModel, bind
from grating_core.models.stored import OUTPUT, StoredModel

_MATRICES = ("up_proj", "gate_proj", "down_proj")  # of a gated MLP: W_u, W_g and W_d
_SMALLEST_CHUNK = 128  # tokens; with fewer, reading a layer's weights from memory is not worth it


class CausalLM(LayeredModel):
    """A language model has the final norm and the whole output embedding of a decoder, in the compute dtype."""

    @property
    def keys(self) -> tuple[int, int]:
        """The number of heads whose keys and values a layer keeps, and the length of one key."""
        return _keys_of(self.layers[0])

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of the next token.

        Args:
            hidden: Hidden states after the last layer, ``[1, T, D]``.

        Returns:
            The logits, float32 ``[V]``.
        """
        logits: Tensor = self.module.lm_head(self._norm(hidden[0, -1:]))[0].float()
        cap: float | None = getattr(self.module.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)


def _keys_of(layer: Any) -> tuple[int, int]:
    attention = layer.self_attn
    return attention.k_proj.out_features // attention.head_dim, attention.head_dim


class _Pruned(nn.Module):
    """This module keeps a dense MLP's biases, where they are bound by name, and computes with a pruned MLP."""

    def __init__(self, dense: Any, mlp: Mlp) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = dense.gate_proj, dense.up_proj, dense.down_proj
        self._mlp = mlp

    def forward(self, hidden: Tensor) -> Tensor:
        biases = {f"{role}.bias": getattr(self, f"{role}_proj").bias for role in ("gate", "up", "down")}
        return self._mlp(hidden[0], {name: bias for name, bias in biases.items() if bias is not None})[None]


class StoredCausalLM(StoredModel):
    """This class reads a stored language model. Its head is the final norm and the output embedding.

    Args:
        directory: See :class:`StoredModel`.
        device: See :class:`StoredModel`.
        dtype: See :class:`StoredModel`.
        attention: See :class:`StoredModel`.
        lasting: See :class:`StoredModel`.
        adapter: See :class:`StoredModel`.
        pruning: How the MLPs are pruned; None for dense MLPs.

    Raises:
        ModelNotFoundError: See :class:`StoredModel`.
        UnsupportedModelError: See :class:`StoredModel`; or the model's MLPs cannot be pruned.
    """

    def __init__(
        self,
        directory: Path,
        *,
        device: torch.device,
        dtype: torch.dtype,
        attention: str | None,
        lasting: bool = False,
        adapter: Adapter | None = None,
        pruning: MlpPruning | None = None,
    ) -> None:
        self._pruning = pruning
        super().__init__(
            directory, device=device, dtype=dtype, attention=attention, lasting=lasting, adapter=adapter
        )

    @property
    def module(self) -> Any:
        """The transformers model, which has its weights only after :meth:`load`."""
        return self._module

    @property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that end a text."""
        return end_tokens(self.directory, self._config)

    def sizes(self, window: int) -> ModelSizes:
        """Return what the parts of the model take in memory, keys and values included.

        Args:
            window: The number of tokens of the longest prompt together with its continuation.
        """
        heads, size = _keys_of(self._decoder_layers[0])
        of_a_token = 2 * heads * size * self.dtype.itemsize * len(self._layers)
        sizes = super().sizes(min(window, _SMALLEST_CHUNK))
        sizes = replace(sizes, keys=window * of_a_token, table_needed=self._tied)
        if self._pruning is None:
            return sizes
        columns = self._columns
        return replace(sizes, columns=columns.depth * columns.layer_bytes, staging=staging_bytes(columns))

    def plan(self, window: int, budget: int) -> MemoryPlan:
        """Spend a memory budget.

        Args:
            window: The number of tokens of the longest prompt together with its continuation.
            budget: The budget in bytes.

        Raises:
            BudgetError: The budget is too small.
        """
        return make_generation_plan(self.sizes(window), budget, window)

    def load(self, plan: MemoryPlan | None) -> CausalLM:
        """Read the weights.

        Args:
            plan: What to keep in memory; None for everything.

        Raises:
            ModelNotFoundError: The files cannot be read.
            FileError: The file with the columns of the MLPs is damaged, or belongs to other weights.
            StorageError: The file with the columns cannot be written.
        """
        if self._pruning is None:
            parts = self._load(plan)
        else:
            # The companion file comes first, because writing it takes memory that the weights do not take yet.
            columns = self._open_columns(self._pruning)
            with closed_on_error(columns):
                parts = replace(self._load(plan), columns=columns)
            with closed_on_error(parts):
                share = 1.0 if plan is None else plan.column_share
                mlps = install(self._specs, columns, self._pruning, share, parts.meter)
                for layer, mlp in zip(self._decoder_layers, mlps, strict=True):
                    layer.mlp = _Pruned(layer.mlp, mlp)
        if self._tied:
            bind(self._module, {OUTPUT: self._module.get_parameter(self._table)})
        return CausalLM(parts)

    @property
    def _specs(self) -> list[LayerSpec]:
        config = self._config
        activation = getattr(config, "hidden_activation", None) or config.hidden_act
        spec = LayerSpec(
            config.hidden_size, 1, 1, 1, config.intermediate_size, Norm("rms", 1e-6), activation, gated=True
        )
        return [spec] * len(self._decoder_layers)

    @property
    def _decoder_layers(self) -> Any:
        return self._module.get_submodule(self.family.layers)

    def _check_family(self) -> None:
        if not self.family.asks:
            able = ", ".join(name for name, family in FAMILIES.items() if family.asks)
            raise UnsupportedModelError(
                f"{self.directory} holds a {self.family.architecture}, which does not generate text; "
                f"supported are {able}"
            )

    def _build(self) -> Any:
        return self.family.module_class(self._config)

    @property
    def _head_dtype(self) -> torch.dtype:
        return self.dtype

    @property
    def _tied(self) -> bool:
        """Whether the embedding table is the output embedding as well."""
        changed = self.adapter is not None and {*self.adapter.changes, *self.adapter.weights}
        return self._tensors[OUTPUT] == self._tensors[self._table] and not (changed and OUTPUT in changed)

    def _head_read(self) -> list[str]:
        return [name for name in self._head if not (name == OUTPUT and self._tied)]

    def _apart(self) -> Collection[str]:
        return {name for names in self._mlps for name in names}

    @property
    def _mlps(self) -> list[list[str]]:
        """The names of W_u, W_g and W_d of each layer, if they are pruned."""
        if self._pruning is None:
            return []
        depth = range(len(self._decoder_layers))
        return [[f"{self.family.layers}.{i}.mlp.{name}.weight" for name in _MATRICES] for i in depth]

    def _sort(self) -> None:
        if self._pruning is not None:
            if self.device.type != "cpu":
                raise UnsupportedModelError(
                    f"mlp_density works on the CPU only, but this model computes on {self.device}: use "
                    f"device='cpu', or leave mlp_density out"
                )
            self._columns = column_sizes(self._specs, self.dtype)
        super()._sort()

    def _open_columns(self, pruning: MlpPruning) -> ColumnFile:
        """Open the companion file, after writing it if there is none."""
        return open_columns(
            cache_directory() / "columns",
            self._columns,
            fingerprint(self.directory, self.adapter),
            self._matrices,
            show_progress=pruning.show_progress,
        )

    def _matrices(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield W_u, W_g and W_d of one layer after the other."""
        staging = aligned_buffer(PIECE)
        groups = [self._group(names, self.dtype) for names in self._mlps]
        buffer = aligned_buffer(max(group.size for group in groups))
        for names, group in zip(self._mlps, groups, strict=True):
            try:
                group.read(buffer, staging)
            except FileError as error:
                raise ModelNotFoundError(f"{error}; delete the file and fetch the model again") from error
            views = group.views(buffer)
            yield views[names[0]], views[names[1]], views[names[2]]
