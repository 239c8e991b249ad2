"""A stored model knows its files before its weights are read, and reads as many weights as a plan says."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grating_core.errors import FileError, ModelNotFoundError, UnsupportedModelError
from grating_core.lifetime import closed_on_error
from grating_core.memory.checkpoint import Checkpoint, aligned_buffer
from grating_core.memory.group import PIECE, TensorGroup
from grating_core.memory.header import FLOATS, StoredTensor
from grating_core.memory.meter import Meter
from grating_core.memory.plan import MemoryPlan, ModelSizes
from grating_core.memory.rows import RowCache
from grating_core.memory.streamer import Streamer
from grating_core.models.adapter import Adapter
from grating_core.models.agreement import check_stored, check_taken
from grating_core.models.directory import blaming_config, read_config, read_headers, weight_files
from grating_core.models.layered import Parts, bind, without_weights, work_per_token

OUTPUT = "lm_head.weight"
"""The name of a decoder's output embedding."""

# Checkpoints that were converted from TensorFlow still use these names.
_LEGACY_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


class StoredModel(ABC):
    """This class holds a model directory whose configuration and headers have been read, but no weights.

    Args:
        directory: A model in Hugging Face layout with safetensors weights.
        device: The device that the weights will go to.
        dtype: The compute dtype of embeddings and layers.
        attention: The name of the attention function, as registered with transformers; None for the one that
            transformers prefers for the model.
        lasting: Whether weights will be read again while requests run; see :class:`Checkpoint`.
        adapter: An adapter that is merged into the weights whenever they are read; None for none.

    Raises:
        ModelNotFoundError: Configuration or weights are missing, damaged or incomplete.
        UnsupportedModelError: grating does not run this architecture, or the adapter is for another model.
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
    ) -> None:
        self.directory = directory
        self.device = device
        self.dtype = dtype
        self.adapter = adapter
        self._config, self.family = read_config(directory)
        self._check_family()
        with blaming_config(directory / "config.json"):
            check_stored(directory / "config.json", self._config, self.family, read_headers(directory))
        # The attribute that transformers documents for it. Some releases prefer a way that ignores Gemma 2's caps.
        capped = getattr(self._config, "attn_logit_softcapping", None) is not None
        self._config._attn_implementation = attention or ("eager" if capped else None)
        with blaming_config(directory / "config.json"), without_weights():
            self._module = self._build()
        self._module.eval().requires_grad_(False)
        try:
            self._checkpoint = Checkpoint(weight_files(directory), lasting=lasting)
        except (FileError, OSError) as error:
            raise ModelNotFoundError(
                f"the weights cannot be read as safetensors ({error}); delete them and fetch the model again"
            ) from error
        with closed_on_error(self._checkpoint):
            self._take(self._checkpoint.tensors)

    def close(self) -> None:
        """Close the files. A model that was loaded from them can then read no more weights."""
        self._checkpoint.close()

    @property
    def window(self) -> int:
        """The most tokens that the model can take."""
        return self.family.window(self._config)

    @property
    def vocabulary(self) -> int:
        """The number of rows of the embedding table."""
        return self._tensors[self._table].shape[0]

    def sizes(self, window: int) -> ModelSizes:
        """Return the sizes of the model's parts in memory.

        Args:
            window: The number of tokens of the longest pair, which is computed in one piece.
        """
        vocabulary, width = self._tensors[self._table].shape
        layer = self._module.get_submodule(self.family.layers)[0]
        return ModelSizes(
            layers=tuple(group.size for group in self._layers.values()),
            bytes_read=tuple(group.bytes_read for group in self._layers.values()),
            vocabulary=vocabulary,
            row=width * self.dtype.itemsize,
            rest=sum(group.size for group in self._rest) + (self.adapter.size if self.adapter else 0),
            converted=any(group.converts for group in self._layers.values()),
            hidden=width * self.dtype.itemsize,
            work=work_per_token(layer, width, self.dtype, pruned=bool(self._apart())),
            window=window,
        )

    def _check_family(self) -> None:  # noqa: B027 - a subclass need not refuse any family
        """Refuse a family that the subclass cannot use."""

    @abstractmethod
    def _build(self) -> Any:
        """Return the module. Its weights have arbitrary values."""

    @property
    @abstractmethod
    def _head_dtype(self) -> torch.dtype:
        """The dtype that the head computes in."""

    def _apart(self) -> Collection[str]:
        """Return the names of weights of layers that are not read with their layer."""
        return ()

    def _take(self, tensors: Mapping[str, StoredTensor]) -> None:
        """Take those of the stored tensors that the module needs."""
        stored = {_modern_name(name): tensor for name, tensor in tensors.items()}
        for target, source in self._module.all_tied_weights_keys.items():
            for name, other in ((target, source), (source, target)):
                if name in stored:
                    stored.setdefault(other, stored[name])
        self._tensors = self._match(stored, self._module.state_dict())
        self._sort()
        if self.adapter is not None:
            self.adapter.check(self._shapes(), [*self._head, OUTPUT], self._table)

    def _match(self, stored: Mapping[str, StoredTensor], wanted: Mapping[str, Tensor]) -> dict[str, StoredTensor]:
        """Return the stored tensor for each parameter of the module."""
        check_taken(self.family, stored, wanted)
        missing = [name for name in wanted if name not in stored]
        if missing:
            raise ModelNotFoundError(
                f"the weights in {self.directory} lack {len(missing)} tensors that {self.family.architecture} "
                f"needs: {', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}"
            )
        for name, parameter in wanted.items():
            if stored[name].kind not in FLOATS:
                raise UnsupportedModelError(
                    f"{stored[name].path} stores {name} as {stored[name].kind}: quantised weights are not "
                    f"supported; use the checkpoint in float32, float16 or bfloat16"
                )
            if stored[name].shape != tuple(parameter.shape):
                raise ModelNotFoundError(
                    f"{self.directory / 'config.json'} does not describe a model that fits its weights: {name} "
                    f"should be {list(parameter.shape)} and is stored as {list(stored[name].shape)}"
                )
        return {name: stored[name] for name in wanted}

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all weights that an adapter may change."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def _sort(self) -> None:
        """Group the tensors that are read together."""
        apart = self._apart()
        in_layers = {
            number + 1: [name for name in self._under(f"{self.family.layers}.{number}.") if name not in apart]
            for number in range(len(self._module.get_submodule(self.family.layers)))
        }
        self._table = f"{self.family.embedding}.weight"
        self._head = self._under(*(f"{part}." for part in self.family.head))
        taken = {self._table, *self._head}.union(apart, *in_layers.values())
        self._layers = {number: self._group(names, self.dtype) for number, names in in_layers.items()}
        self._rest = [
            self._group(self._head_read(), self._head_dtype),
            self._group([name for name in self._tensors if name not in taken], self.dtype),
        ]
        self._embedding = self._group([self._table], self.dtype)

    def _head_read(self) -> list[str]:
        """Return the names of the head's weights that are still to be read; a tied one is the embedding table."""
        return self._head

    def _under(self, *prefixes: str) -> list[str]:
        return [name for name in self._tensors if name.startswith(prefixes)]

    def _group(self, names: Iterable[str], dtype: torch.dtype) -> TensorGroup:
        tensors = {name: self._tensors[name] for name in names}
        changes = {} if self.adapter is None else self.adapter.changes
        return TensorGroup(self._checkpoint, tensors, dict.fromkeys(tensors, dtype), changes)

    def _load(self, plan: MemoryPlan | None, also: Sequence[TensorGroup] = ()) -> Parts:
        """Read the resident weights, and make the readers of the others.

        Args:
            plan: What to keep in memory; None for everything.
            also: Further tensors to read.

        Raises:
            ModelNotFoundError: The files cannot be read.
        """
        meter = Meter()
        rows = self._read_resident(plan, also, meter)
        streamed = {} if plan is None else {number: self._layers[number] for number in plan.streamed}
        streamer = Streamer(streamed, self.device, meter) if streamed else None
        lasting = streamer is not None or rows is not None
        if not lasting:
            self._checkpoint.close()
        return Parts(
            module=self._module,
            family=self.family,
            device=self.device,
            dtype=self.dtype,
            meter=meter,
            streamer=streamer,
            rows=rows,
            checkpoint=self._checkpoint if lasting else None,
        )

    def _read_resident(
        self, plan: MemoryPlan | None, also: Sequence[TensorGroup], meter: Meter
    ) -> RowCache | None:
        """Bind the resident weights. Return the row cache if the embedding table is not resident, else None."""
        staging = aligned_buffer(PIECE)
        resident = self._layers.keys() if plan is None else plan.resident
        rows = None
        try:
            for group in (*self._rest, *(self._layers[number] for number in resident), *also):
                bind(self._module, self._read(group, staging))
            if plan is None or plan.table_resident:
                bind(self._module, self._read(self._embedding, staging))
            else:
                rows = self._row_cache(plan, meter)
                self._module.set_submodule(self.family.embedding, rows)
        except FileError as error:
            raise ModelNotFoundError(f"{error}; delete the file and fetch the model again") from error
        if self.adapter is not None:
            replaced = self.adapter.weights.items()
            bind(self._module, {name: w.to(self.device, self._head_dtype) for name, w in replaced})
        for module in self._module.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))
        return rows

    def _read(self, group: TensorGroup, staging: Tensor) -> dict[str, Tensor]:
        buffer = aligned_buffer(group.size)
        group.read(buffer, staging)
        return group.views(buffer.to(self.device))

    def _row_cache(self, plan: MemoryPlan, meter: Meter) -> RowCache:
        return RowCache(
            self._checkpoint,
            self._tensors[self._table],
            capacity=plan.embedding_rows,
            dtype=self.dtype,
            device=self.device,
            meter=meter,
            # Gemma multiplies the rows that it looks up.
            scale=getattr(self._module.get_submodule(self.family.embedding), "embed_scale", None),
        )


def _modern_name(name: str) -> str:
    for old, new in _LEGACY_NAMES.items():
        name = name.replace(old, new)
    return name
