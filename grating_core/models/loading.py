"""From a model directory to a loaded cross-encoder, all of it in memory or as much as a plan says."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor

from grating_core.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError
from grating_core.memory.checkpoint import FLOATS, Checkpoint, StoredTensor, aligned_buffer
from grating_core.memory.group import PIECE, TensorGroup
from grating_core.memory.meter import Meter
from grating_core.memory.plan import MemoryPlan, ModelSizes
from grating_core.memory.rows import RowCache
from grating_core.memory.streamer import Streamer
from grating_core.models.adapter import Adapter
from grating_core.models.cross_encoder import CrossEncoder, bind, construction, work_per_token
from grating_core.models.directory import blaming_config, read_config, weight_files

# Names that checkpoints converted from TensorFlow still use.
_LEGACY_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


class StoredModel:
    """A model directory whose configuration and tensor headers have been read, but no weights.

    Args:
        directory: A model in Hugging Face layout with safetensors weights.
        device: Where the weights will go.
        dtype: The compute dtype of embeddings and layers; the head is kept in float32.
        attention: Name of the attention function, as registered with transformers.
        lasting: Whether weights will be read again while requests run; see :class:`Checkpoint`.
        adapter: Is merged into the weights whenever they are read.

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
        attention: str,
        lasting: bool = False,
        adapter: Adapter | None = None,
    ) -> None:
        self.directory = directory
        self.device = device
        self._dtype = dtype
        self.adapter = adapter
        self._config, self.family = read_config(directory)
        self._config._attn_implementation = attention
        with blaming_config(directory / "config.json"), construction, init_empty_weights(include_buffers=False):
            self._module = self.family.build(self._config)
        self._module.eval().requires_grad_(False)
        try:
            self._checkpoint = Checkpoint(weight_files(directory), lasting=lasting)
        except (CheckpointError, OSError) as error:
            raise ModelNotFoundError(
                f"the weights cannot be read as safetensors ({error}); delete them and fetch the model again"
            ) from error
        self._tensors = self._match()
        self._sort()
        if adapter is not None:
            adapter.check({name: tensor.shape for name, tensor in self._tensors.items()}, self._head)

    def _match(self) -> dict[str, StoredTensor]:
        """The stored tensor for each parameter of the module."""
        stored = {_modern_name(name): tensor for name, tensor in self._checkpoint.tensors.items()}
        wanted = self._module.state_dict()
        for target, source in self._module.all_tied_weights_keys.items():
            if source in stored:
                stored.setdefault(target, stored[source])
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

    def _sort(self) -> None:
        """Group the tensors by what is read together."""
        layers = self.family.layers
        depth = len(self._module.get_submodule(layers))
        in_layers = {number: self._under((f"{layers}.{number - 1}.",)) for number in range(1, depth + 1)}
        self._table = f"{self.family.embedding}.weight"
        self._head = self._under(tuple(f"{part}." for part in self.family.head))
        taken = {self._table, *self._head}.union(*in_layers.values())
        self._layers = {number: self._group(names, self._dtype) for number, names in in_layers.items()}
        self._rest = [
            self._group(self._head, torch.float32),
            self._group([name for name in self._tensors if name not in taken], self._dtype),
        ]
        self._embedding = self._group([self._table], self._dtype)

    def _under(self, prefixes: tuple[str, ...]) -> list[str]:
        return [name for name in self._tensors if name.startswith(prefixes)]

    def _group(self, names: Iterable[str], dtype: torch.dtype) -> TensorGroup:
        tensors = {name: self._tensors[name] for name in names}
        changes = {} if self.adapter is None else self.adapter.changes
        return TensorGroup(self._checkpoint, tensors, dict.fromkeys(tensors, dtype), changes)

    def _answer_rows(self, answers: tuple[int, int | None]) -> TensorGroup:
        """The rows of the output embedding that belong to the answers."""
        if (last := max(token or 0 for token in answers)) >= self._output.shape[0]:
            raise ModelNotFoundError(
                f"the tokenizer in {self.directory} has a token {last}, and the model's output embedding only "
                f"{self._output.shape[0]} rows: they are not of the same model"
            )
        rows = {
            f"lm_head.{name}": self._output.row(token)
            for name, token in zip(("yes", "no"), answers, strict=True)
            if token is not None
        }
        return TensorGroup(self._checkpoint, rows, dict.fromkeys(rows, torch.float32))

    @property
    def window(self) -> int:
        """The most tokens that the model can take."""
        return self.family.window(self._config)

    def sizes(self, window: int) -> ModelSizes:
        """What the parts of the model take in memory.

        Args:
            window: Tokens of the longest pair.
        """
        vocabulary, width = self._tensors[self._table].shape
        layer = self._module.get_submodule(self.family.layers)[0]
        return ModelSizes(
            layers=tuple(group.size for group in self._layers.values()),
            bytes_read=tuple(group.bytes_read for group in self._layers.values()),
            vocabulary=vocabulary,
            row=width * self._dtype.itemsize,
            rest=sum(group.size for group in self._rest) + (self.adapter.size if self.adapter else 0),
            converted=any(group.converts for group in self._layers.values()),
            hidden=width * self._dtype.itemsize,
            work=work_per_token(layer, width, self._dtype),
            window=window,
        )

    def load(self, plan: MemoryPlan | None, answers: tuple[int, int | None] | None = None) -> CrossEncoder:
        """Read the weights.

        Args:
            plan: What to keep in memory; None for everything.
            answers: The tokens whose logits are the score, if the family asks; the second may be missing.

        Raises:
            ModelNotFoundError: The files cannot be read.
        """
        meter = Meter()
        staging = aligned_buffer(PIECE)
        resident = self._layers.keys() if plan is None else plan.resident
        groups = [*self._rest, *(self._layers[number] for number in resident)]
        if self.family.asks:
            assert answers is not None
            if answers[1] is None:
                self._module.lm_head.no = None
            groups.append(self._answer_rows(answers))
        try:
            for group in groups:
                bind(self._module, self._read(group, staging))
            if plan is None or plan.table_resident:
                bind(self._module, self._read(self._embedding, staging))
                rows = None
            else:
                rows = self._row_cache(plan, meter)
                self._module.set_submodule(self.family.embedding, rows)
            if self.adapter is not None:
                bind(self._module, {name: w.to(self.device) for name, w in self.adapter.weights.items()})
        except CheckpointError as error:
            raise ModelNotFoundError(f"{error}; delete the file and fetch the model again") from error
        for module in self._module.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))
        streamed = {} if plan is None else {number: self._layers[number] for number in plan.streamed}
        streamer = Streamer(streamed, self.device, meter) if streamed else None
        if streamer is None and rows is None:
            self._checkpoint.close()
        return CrossEncoder(
            self._module, self.family, self.device, self._dtype, streamer=streamer, rows=rows, meter=meter
        )

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


def _modern_name(name: str) -> str:
    for old, new in _LEGACY_NAMES.items():
        name = name.replace(old, new)
    return name
