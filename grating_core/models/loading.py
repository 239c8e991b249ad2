"""From a model directory to a loaded model, all of it in memory or as much as a plan says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grating_core.columns.companion import ColumnFile, ColumnSizes
from grating_core.columns.install import MlpPruning, install, open_columns, staging_bytes
from grating_core.columns.masks import find_gated_mlp
from grating_core.errors import FileError, ModelNotFoundError, UnsupportedModelError
from grating_core.files.places import cache_directory
from grating_core.lens.features import Shape
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
from grating_core.models.causal_lm import CausalLM, keys_of
from grating_core.models.cross_encoder import CrossEncoder
from grating_core.models.directory import blaming_config, end_tokens, read_config, read_headers, weight_files
from grating_core.models.families import FAMILIES
from grating_core.models.identity import fingerprint
from grating_core.models.layered import bind, without_weights, work_per_token

_OUTPUT = "lm_head.weight"
_MATRICES = ("up_proj", "gate_proj", "down_proj")  # of a gated MLP: W_u, W_g and W_d
_SMALLEST_CHUNK = 128  # tokens; with fewer, a layer's weights go through the processor's caches for too little

# Names that checkpoints converted from TensorFlow still use.
_LEGACY_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


class StoredModel:
    """A model directory whose configuration and tensor headers have been read, but no weights.

    What is made of them depends on the head: :class:`StoredCrossEncoder`, :class:`StoredCausalLM`.

    Args:
        directory: A model in Hugging Face layout with safetensors weights.
        device: Where the weights will go.
        dtype: The compute dtype of embeddings and layers.
        attention: Name of the attention function, as registered with transformers; None for the one that
            transformers prefers for the model.
        lasting: Whether weights will be read again while requests run; see :class:`Checkpoint`.
        adapter: Is merged into the weights whenever they are read.
        pruning: How the MLPs are pruned; None for not at all.

    Raises:
        ModelNotFoundError: Configuration or weights are missing, damaged or incomplete.
        UnsupportedModelError: grating does not run this architecture, or cannot prune its MLPs, or the adapter is
            for another model.
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
        self.directory = directory
        self.device = device
        self._dtype = dtype
        self.adapter = adapter
        self._pruning = pruning
        self._config, self.family = read_config(directory)
        self._check_family()
        with blaming_config(directory / "config.json"):
            check_stored(directory / "config.json", self._config, self.family, read_headers(directory))
        self._config._attn_implementation = attention
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
        """Close the files, unless a model that was loaded from them reads them."""
        self._checkpoint.close()

    def _take(self, tensors: Mapping[str, StoredTensor]) -> None:
        """Find a place for the stored tensors, as far as the module wants them."""
        stored = {_modern_name(name): tensor for name, tensor in tensors.items()}
        for target, source in self._module.all_tied_weights_keys.items():
            for name, other in ((target, source), (source, target)):
                if name in stored:
                    stored.setdefault(other, stored[name])
        self._tensors = self._match(stored, self._module.state_dict())
        self._sort()
        if self.adapter is not None:
            self.adapter.check(self._shapes(), [*self._head, _OUTPUT], self._table)

    def _check_family(self) -> None:
        """Refuse a family that cannot do what is wanted of it."""

    def _build(self) -> Any:
        """The module, with weights of any content."""
        raise NotImplementedError

    @property
    def _head_dtype(self) -> torch.dtype:
        """What the head computes in."""
        raise NotImplementedError

    def _match(self, stored: Mapping[str, StoredTensor], wanted: Mapping[str, Tensor]) -> dict[str, StoredTensor]:
        """The stored tensor for each parameter of the module."""
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
                    f"{stored[name].path} stores {name} as {stored[name].kind}: quantised weights mean "
                    f"nothing without their scales and are not supported; use the checkpoint in float32, float16 "
                    f"or bfloat16"
                )
            if stored[name].shape != tuple(parameter.shape):
                raise ModelNotFoundError(
                    f"{self.directory / 'config.json'} does not describe a model that fits its weights: {name} "
                    f"should be {list(parameter.shape)} and is stored as {list(stored[name].shape)}"
                )
        return {name: stored[name] for name in wanted}

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all weights that an adapter may change."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def _sort(self) -> None:
        """Group the tensors by what is read together."""
        layers = self.family.layers
        depth = len(self._module.get_submodule(layers))
        in_layers = {number: self._under((f"{layers}.{number - 1}.",)) for number in range(1, depth + 1)}
        self._mlps: list[list[str]] = []
        if self._pruning is not None:
            self._columns = self._measure_mlps()
            self._mlps = [[f"{layers}.{i}.mlp.{name}.weight" for name in _MATRICES] for i in range(depth)]
            in_layers = {
                number: [name for name in names if name not in self._mlps[number - 1]]
                for number, names in in_layers.items()
            }
        self._table = f"{self.family.embedding}.weight"
        self._head = self._under(tuple(f"{part}." for part in self.family.head))
        taken = {self._table, *self._head}.union(*in_layers.values(), *self._mlps)
        self._layers = {number: self._group(names, self._dtype) for number, names in in_layers.items()}
        self._rest = [
            self._group(self._head_read(), self._head_dtype),
            self._group([name for name in self._tensors if name not in taken], self._dtype),
        ]
        self._embedding = self._group([self._table], self._dtype)

    def _measure_mlps(self) -> ColumnSizes:
        if self.device.type != "cpu":
            raise UnsupportedModelError(
                f"mlp_density is for the CPU so far, and this model is to compute on {self.device}: use "
                f"device='cpu', or leave mlp_density out"
            )
        layers = self._module.get_submodule(self.family.layers)
        mlp = find_gated_mlp(layers[0])
        return ColumnSizes(len(layers), mlp.down_proj.out_features, mlp.down_proj.in_features, self._dtype)

    def _head_read(self) -> list[str]:
        """Names of the head's weights, as far as they are not there already."""
        return self._head

    def _under(self, prefixes: tuple[str, ...]) -> list[str]:
        return [name for name in self._tensors if name.startswith(prefixes)]

    def _group(self, names: Iterable[str], dtype: torch.dtype) -> TensorGroup:
        tensors = {name: self._tensors[name] for name in names}
        changes = {} if self.adapter is None else self.adapter.changes
        return TensorGroup(self._checkpoint, tensors, dict.fromkeys(tensors, dtype), changes)

    @property
    def window(self) -> int:
        """The most tokens that the model can take."""
        return self.family.window(self._config)

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding table."""
        return self._tensors[self._table].shape[0]

    def sizes(self, window: int) -> ModelSizes:
        """What the parts of the model take in memory.

        Args:
            window: Tokens of the longest piece that is computed at once: of the longest pair.
        """
        vocabulary, width = self._tensors[self._table].shape
        layer = self._module.get_submodule(self.family.layers)[0]
        columns = None if self._pruning is None else self._columns
        return ModelSizes(
            layers=tuple(group.size for group in self._layers.values()),
            bytes_read=tuple(group.bytes_read for group in self._layers.values()),
            vocabulary=vocabulary,
            row=width * self._dtype.itemsize,
            rest=sum(group.size for group in self._rest) + (self.adapter.size if self.adapter else 0),
            converted=any(group.converts for group in self._layers.values()),
            hidden=width * self._dtype.itemsize,
            work=work_per_token(layer, width, self._dtype, pruned=self._pruning is not None),
            window=window,
            columns=columns.depth * columns.layer_bytes if columns else 0,
            staging=staging_bytes(columns) if columns else 0,
        )

    def _load(self, plan: MemoryPlan | None, also: Sequence[TensorGroup] = ()) -> dict[str, Any]:
        """Read the weights that are resident, and make what brings the others.

        Args:
            plan: What to keep in memory; None for everything.
            also: What else to read.

        Returns:
            What :class:`LayeredModel` is made of.

        Raises:
            ModelNotFoundError: The files cannot be read.
        """
        meter = Meter()
        # First, as long as there is nothing else in memory: it may have to be written.
        columns = None if self._pruning is None else self._open_columns(self._pruning)
        try:
            rows = self._read_resident(plan, also, meter)
            if columns is not None:
                self._install(columns, plan, meter)
            streamed = {} if plan is None else {number: self._layers[number] for number in plan.streamed}
            streamer = Streamer(streamed, self.device, meter) if streamed else None
        except BaseException:
            if columns is not None:
                columns.close()
            raise
        lasting = streamer is not None or rows is not None
        if not lasting:
            self._checkpoint.close()
        return {
            "module": self._module,
            "family": self.family,
            "device": self.device,
            "dtype": self._dtype,
            "streamer": streamer,
            "rows": rows,
            "columns": columns,
            "checkpoint": self._checkpoint if lasting else None,
            "meter": meter,
        }

    def _read_resident(
        self, plan: MemoryPlan | None, also: Sequence[TensorGroup], meter: Meter
    ) -> RowCache | None:
        """Bind what stays in memory, and return what stands in for the embedding table if that does not."""
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

    def _install(self, columns: ColumnFile, plan: MemoryPlan | None, meter: Meter) -> None:
        assert self._pruning is not None
        layers = list(self._module.get_submodule(self.family.layers))
        install(layers, columns, self._pruning, 1.0 if plan is None else plan.column_share, meter)

    def _open_columns(self, pruning: MlpPruning) -> ColumnFile:
        """The companion file, written first if there is none."""
        identity = fingerprint(self.directory, self.adapter)
        return open_columns(
            cache_directory() / "columns",
            self._columns,
            identity,
            self._matrices,
            show_progress=pruning.show_progress,
        )

    def _matrices(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """W_u, W_g and W_d of one layer after the other."""
        staging = aligned_buffer(PIECE)
        groups = [self._group(names, self._dtype) for names in self._mlps]
        buffer = aligned_buffer(max(group.size for group in groups))
        for names, group in zip(self._mlps, groups, strict=True):
            try:
                group.read(buffer, staging)
            except FileError as error:
                raise ModelNotFoundError(f"{error}; delete the file and fetch the model again") from error
            views = group.views(buffer)
            yield views[names[0]], views[names[1]], views[names[2]]

    def _read(self, group: TensorGroup, staging: Tensor) -> dict[str, Tensor]:
        buffer = aligned_buffer(group.size)
        group.read(buffer, staging)
        return group.views(buffer.to(self.device))

    def _row_cache(self, plan: MemoryPlan, meter: Meter) -> RowCache:
        return RowCache(
            self._checkpoint,
            self._tensors[self._table],
            capacity=plan.embedding_rows,
            dtype=self._dtype,
            device=self.device,
            meter=meter,
            # Gemma multiplies what it looks up.
            scale=getattr(self._module.get_submodule(self.family.embedding), "embed_scale", None),
        )


class StoredCrossEncoder(StoredModel):
    """A stored reranker. Its head is float32; of a model that is asked, the head is the rows of the answers."""

    _head_dtype = torch.float32

    def _build(self) -> Any:
        return self.family.build(self._config)

    def _match(self, stored: Mapping[str, StoredTensor], wanted: Mapping[str, Tensor]) -> dict[str, StoredTensor]:
        if self.family.asks:
            # The rows of the answers are known once there is a tokenizer.
            wanted = {name: parameter for name, parameter in wanted.items() if not name.startswith("lm_head.")}
            if (output := stored.get("lm_head.weight")) is None:
                raise ModelNotFoundError(
                    f"the weights in {self.directory} lack lm_head.weight, the answers' logits"
                )
            if output.kind not in FLOATS or output.shape[1:] != (self._config.hidden_size,):
                raise UnsupportedModelError(
                    f"{output.path} stores {output.name} as {output.kind} {list(output.shape)}; it should be "
                    f"floats [tokens, {self._config.hidden_size}]"
                )
            self._output = output
        return super()._match(stored, wanted)

    @property
    def shape(self) -> Shape:
        """What a lens has to fit."""
        return Shape(len(self._layers), self._tensors[self._table].shape[1], self.family.pooling(self._config))

    def load(self, plan: MemoryPlan | None, answers: tuple[int, int | None] | None = None) -> CrossEncoder:
        """Read the weights.

        Args:
            plan: What to keep in memory; None for everything.
            answers: The tokens whose logits are the score, if the family asks; the second may be missing.

        Raises:
            ModelNotFoundError: The files cannot be read.
        """
        if not self.family.asks:
            return CrossEncoder(**self._load(plan))
        assert answers is not None
        if answers[1] is None:
            self._module.lm_head.no = None
        rows = self._answer_rows(answers)
        return CrossEncoder(**self._load(plan, [rows]))

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return super()._shapes() | ({_OUTPUT: self._output.shape} if self.family.asks else {})

    def _answer_rows(self, answers: tuple[int, int | None]) -> TensorGroup:
        """The rows of the output embedding that belong to the answers."""
        if (last := max(token or 0 for token in answers)) >= self._output.shape[0]:
            raise ModelNotFoundError(
                f"the tokenizer in {self.directory} has a token {last}, and the model's output embedding only "
                f"{self._output.shape[0]} rows: they are not of the same model"
            )
        numbers = {
            f"lm_head.{name}": token
            for name, token in zip(("yes", "no"), answers, strict=True)
            if token is not None
        }
        if self.adapter is not None:
            self.adapter = self.adapter.pick_rows(_OUTPUT, numbers)
        rows = {name: self._output.row(number) for name, number in numbers.items()}
        changes = {} if self.adapter is None else self.adapter.changes
        return TensorGroup(self._checkpoint, rows, dict.fromkeys(rows, torch.float32), changes)


class StoredCausalLM(StoredModel):
    """A stored language model, to generate with. Its head is the final norm and the output embedding."""

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
    def module(self) -> Any:
        """The transformers model, which has its weights once they were loaded."""
        return self._module

    @property
    def _head_dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def _tied(self) -> bool:
        """Whether the embedding table is the output embedding as well."""
        changed = self.adapter is not None and {*self.adapter.changes, *self.adapter.weights}
        return self._tensors[_OUTPUT] == self._tensors[self._table] and not (changed and _OUTPUT in changed)

    def _head_read(self) -> list[str]:
        return [name for name in self._head if not (name == _OUTPUT and self._tied)]

    @property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that end a text."""
        return end_tokens(self.directory, self._config)

    def sizes(self, window: int) -> ModelSizes:
        """What the parts of the model take in memory, keys and values included.

        Args:
            window: Tokens of the longest prompt together with its continuation.
        """
        heads, size = keys_of(self._module.get_submodule(self.family.layers)[0])
        of_a_token = 2 * heads * size * self._dtype.itemsize * len(self._layers)
        sizes = super().sizes(min(window, _SMALLEST_CHUNK))
        return replace(sizes, keys=window * of_a_token, table_needed=self._tied)

    def load(self, plan: MemoryPlan | None) -> CausalLM:
        """Read the weights.

        Args:
            plan: What to keep in memory; None for everything.

        Raises:
            ModelNotFoundError: The files cannot be read.
        """
        parts = self._load(plan)
        if self._tied:
            bind(self._module, {_OUTPUT: self._module.get_parameter(self._table)})
        return CausalLM(**parts)


def _modern_name(name: str) -> str:
    for old, new in _LEGACY_NAMES.items():
        name = name.replace(old, new)
    return name
