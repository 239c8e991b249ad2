"""A stored language model knows its weights on disk, plans their memory, and reads them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from grating_core.columns.companion import writing_bytes
from grating_core.columns.install import MlpPruning, column_sizes, install, open_columns, staging_bytes
from grating_core.columns.reading import ColumnFile
from grating_core.errors import StorageError, UnsupportedModelError
from grating_core.files.places import cache_directory
from grating_core.kernels.operands import Weight
from grating_core.layers.keys_values import bytes_of_keys_values
from grating_core.layers.packed_table import PackedTable
from grating_core.layers.spec import Role
from grating_core.lifetime import closed_on_error
from grating_core.memory.checkpoint import aligned_buffer
from grating_core.memory.group import PIECE, TensorGroup
from grating_core.memory.plan import MemoryPlan, ModelSizes, make_generation_plan
from grating_core.models.adapter import Adapter
from grating_core.models.as_stored import FORMATS, ROWS, Rows, keeps_blocks
from grating_core.models.causal_lm import CausalLM
from grating_core.models.directory import blaming_weights, end_tokens
from grating_core.models.families import FAMILIES
from grating_core.models.identity import fingerprint
from grating_core.models.layered import Parts
from grating_core.models.layout import layer_names
from grating_core.models.mlp_matrices import read_matrices, reading_bytes
from grating_core.models.packed_file import PackedFile
from grating_core.models.packing import PackedLayers, Packing
from grating_core.models.sampling import find_importances, new_sample, sampling_bytes
from grating_core.models.stored import OUTPUT, StoredModel

_log = logging.getLogger("grating")
_MATRICES: frozenset[Role] = frozenset(("up", "gate", "down"))  # of a gated MLP: W_u, W_g and W_d


class StoredCausalLM(StoredModel):
    """This class reads a stored language model. Its head is the final norm and the output embedding.

    Args:
        directory: See :class:`StoredModel`.
        device: See :class:`StoredModel`.
        dtype: See :class:`StoredModel`.
        lasting: See :class:`StoredModel`.
        adapter: See :class:`StoredModel`.
        pruning: How the MLPs are pruned; None for dense MLPs.
        packing: How weights are quantised; None for the weights as they are.
        kv_bits: The bits of keys and values, 8; None for the compute dtype.
        show_progress: Whether to show a progress bar while the file with quantised weights is written.

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
        lasting: bool = False,
        adapter: Adapter | None = None,
        pruning: MlpPruning | None = None,
        packing: Packing | None = None,
        kv_bits: int | None = None,
        show_progress: bool = False,
    ) -> None:
        self._pruning = pruning
        self._chosen = packing
        if packing is not None and pruning is not None:
            self._chosen = replace(packing, apart=_MATRICES)
        self._kv_bits = kv_bits
        self._show_progress = show_progress
        super().__init__(directory, device=device, dtype=dtype, lasting=lasting, adapter=adapter)

    @property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that end a text."""
        return end_tokens(self.directory, self.config.fields)

    def sizes(self, window: int, packing: Packing | None = None) -> ModelSizes:
        """Return what the parts of the model take in memory, keys and values included.

        Args:
            window: The number of tokens of the longest prompt together with its continuation.
            packing: None: the model knows how its weights are quantised.
        """
        sizes = super().sizes(window, self._quantized)
        keys = bytes_of_keys_values(self.spec.layers[0], self.spec.depth, window, self.dtype, self._kv_bits)
        sizes = replace(sizes, keys=keys, table_needed=self._is_tied)
        if (output := self._packed_output) > 0:
            if self._is_tied:
                sizes = replace(sizes, row=-(-output // sizes.vocabulary))
            else:
                sizes = replace(sizes, rest=sizes.rest + output)
        if self._pruning is not None or (self._quantized is not None and self._quantized.weighed):
            sampling = sampling_bytes(self.spec, self._whole_layers, self.dtype)
            sizes = replace(sizes, writing=max(sizes.writing, sampling))
        if self._pruning is None:
            return sizes
        columns = self._columns
        return replace(
            sizes,
            columns=columns.depth * columns.layer_bytes,
            staging=staging_bytes(columns),
            writing=max(sizes.writing, reading_bytes(self._mlp_groups()) + writing_bytes(columns)),
        )

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
            FileError: The file with the quantised weights, or with the columns of the MLPs, is damaged, or belongs
                to other weights.
            StorageError: That file cannot be written.
        """
        if self._pruning is None:
            return CausalLM(replace(self._load_unpruned(plan), kv_bits=self._kv_bits))
        # The companion file comes first, because writing it takes memory that the weights do not take yet.
        columns = self._open_columns(self._pruning)
        with closed_on_error(columns):
            parts = replace(self._load_unpruned(plan), kv_bits=self._kv_bits)
            with closed_on_error(parts):
                share = 1.0 if plan is None else plan.column_share
                mlps, fetcher = install(self.spec.layers, columns, self._pruning, share, parts.meter)
        return CausalLM(replace(parts, mlps=mlps, columns=fetcher))

    def _load_unpruned(self, plan: MemoryPlan | None) -> Parts:
        """Read all weights but those of pruned MLPs."""
        if self._quantized is None:
            parts = self._load(plan)
        else:
            parts = self._load_quantized(plan, self._packed(self._quantized))
        if self._is_tied and parts.output is None:
            parts = replace(parts, head={"vocabulary.weight": parts.outside["table.weight"]})
        return parts

    def _load_quantized(self, plan: MemoryPlan | None, packed: PackedLayers) -> Parts:
        """Read the quantised weights from their file, which is written first if it is not there.

        If there is no room for the file, and no layer is streamed from it, weights are quantised in memory.
        """
        streams = plan is not None and bool(plan.streamed)
        try:
            # What is stored in blocks is packed as fast as it is read.
            file = packed.open(needed=streams or not packed.packing.kinds, show_progress=self._show_progress)
        except StorageError as error:
            if streams:
                raise
            _log.warning("weights are quantised whenever the model is loaded: %s", error)
            file = None
        with closed_on_error(file) if file is not None else nullcontext():
            output = None if packed.packing.output is None else self._output(packed, file)
            parts = replace(self._parts(plan, (), packed, file), output=output)
        return replace(parts, rows=PackedTable(output, self.dtype)) if output and self._is_tied else parts

    def _output(self, packed: PackedLayers, file: PackedFile | None) -> Weight:
        """Read the quantised output embedding, or quantise it now."""
        if file is None:
            with blaming_weights():
                return packed.output()
        return packed.output_of(self._read(file.groups[self.spec.depth + 1], aligned_buffer(PIECE)))

    @property
    def packing(self) -> Packing | None:
        """How the layers are packed; None if torch computes them."""
        return self._quantized or self._packing

    @property
    def _quantized(self) -> Packing | None:
        """How weights are quantised: as the user chose, or as they are stored; None if they are not."""
        return self._chosen or self._as_stored

    @cached_property
    def _as_stored(self) -> Packing | None:
        packing, output = super()._as_stored, self._tensors[OUTPUT]
        return replace(packing, output=FORMATS[output.kind]) if packing and keeps_blocks(output) else packing

    def _packed(self, packing: Packing) -> PackedLayers:
        packed = super()._packed(packing)
        packed.importances = lambda: self.importances
        return packed

    @cached_property
    def importances(self) -> tuple[Mapping[Role, Tensor], ...]:
        """What a sample of tokens finds in each layer: mean squares of the inputs of products, by role."""
        table, others = self._tensors[self._table], self._group(*self._always[1])
        sample = new_sample(self.family, self.spec, self._checkpoint, table, others, self.dtype)
        groups, show = self._whole_layers, self._show_progress
        return find_importances(sample, self.family, self.spec, groups, show_progress=show)

    @property
    def _whole_layers(self) -> dict[int, TensorGroup]:
        """All weights of each layer on disk as they are stored, those of pruned MLPs as well."""
        layers = enumerate(self.spec.layers, 1)
        return {number: self._group(layer_names(self.family, layer, number)) for number, layer in layers}

    @property
    def _packs_output(self) -> bool:
        return self._quantized is not None and self._quantized.output is not None

    @property
    def _packed_output(self) -> int:
        """The bytes of the quantised output embedding; 0 if it is not quantised."""
        return 0 if self._quantized is None else self._packed(self._quantized).output_size

    def _output_parts(self) -> Sequence[Rows]:
        if not self._packs_output:
            return ()
        changed = self.adapter is not None and OUTPUT in self.adapter.changes
        return self._rows(OUTPUT, self.spec.vocabulary if changed else ROWS, in_blocks=self._chosen is None)

    def _check_family(self) -> None:
        if not self.family.asks:
            able = ", ".join(name for name, family in FAMILIES.items() if family.asks)
            raise UnsupportedModelError(
                f"{self.directory} holds a {self.family.architecture}, which does not generate text; "
                f"supported are {able}"
            )

    @property
    def _head_dtype(self) -> torch.dtype:
        return self.dtype

    @property
    def _is_tied(self) -> bool:
        """Whether the embedding table is the output embedding as well."""
        changed = self.adapter is not None and {*self.adapter.changes, *self.adapter.weights}
        return self._tensors[OUTPUT] == self._tensors[self._table] and not (changed and OUTPUT in changed)

    def _not_read(self) -> Collection[str]:
        if not self._packs_output:
            return (OUTPUT,) if self._is_tied else ()
        return (OUTPUT, self._table) if self._is_tied else (OUTPUT,)

    def _apart(self) -> Collection[str]:
        return {name for names in self._mlps for name in names}

    @property
    def _mlps(self) -> list[list[str]]:
        """The names of the tensors that hold W_u, W_g and W_d of each layer, if they are pruned."""
        if self._pruning is None:
            return []
        names = [name for name, held in self.family.layer.items() if not _roles(held).isdisjoint(_MATRICES)]
        layers = [f"{self.family.layers}.{index}" for index in range(self.spec.depth)]
        return [[f"{layer}.{name}.weight" for name in names] for layer in layers]

    def _sort(self, in_layers: list[list[str]], outside: list[str], head: list[str]) -> None:
        if self._pruning is not None:
            if self.device.type != "cpu":
                raise UnsupportedModelError(
                    f"mlp_density works on the CPU only, but this model computes on {self.device}: use "
                    f"device='cpu', or leave mlp_density out"
                )
            self._columns = column_sizes(self.spec.layers, self.dtype, self._pruning.bits)
            if self._quantized is not None and self.spec.layers[0].biased & _MATRICES:
                raise UnsupportedModelError(
                    f"the MLPs of {self.directory} have biases, which bits={self._pruning.bits} and mlp_density "
                    f"together do not allow: leave one of them out"
                )
        super()._sort(in_layers, outside, head)

    def _open_columns(self, pruning: MlpPruning) -> ColumnFile:
        """Open the companion file, after writing it if there is none."""
        return open_columns(
            cache_directory() / "columns",
            self._columns,
            fingerprint(self.directory, self.adapter),
            lambda: read_matrices(self.family, self.spec, self._mlp_groups(), self.importances),
            show_progress=pruning.show_progress,
        )

    def _mlp_groups(self) -> list[TensorGroup]:
        """Return W_u, W_g and W_d of each layer on disk."""
        return [self._group(names, self.dtype) for names in self._mlps]


def _roles(held: Role | tuple[Role, ...]) -> set[Role]:
    """Return the roles that a tensor holds."""
    return {held} if isinstance(held, str) else set(held)
