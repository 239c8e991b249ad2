"""A cross-encoder is a layered model whose head reads scores; here is its form on disk as well."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grating_core.errors import ModelNotFoundError, UnsupportedModelError
from grating_core.layers.linear import Weights
from grating_core.memory.blocks import READABLE
from grating_core.memory.checkpoint import aligned_buffer
from grating_core.memory.group import PIECE, TensorGroup
from grating_core.memory.header import StoredTensor
from grating_core.memory.meter import Meter
from grating_core.memory.plan import MemoryPlan, ModelSizes, make_plan
from grating_core.models.family import ModelSpec, Pooling
from grating_core.models.layered import LayeredModel, LosslessLayers
from grating_core.models.layout import Shape as TensorShape
from grating_core.models.layout import layer_names
from grating_core.models.packing import Packing
from grating_core.models.stored import OUTPUT, StoredModel

_ANSWERS = ("yes.weight", "no.weight")
_LISTWISE = (
    "the model reads all documents of a block together, so that a score depends on the others, on their order and "
    "on their number; every layer computes every document"
)


class Shape(NamedTuple):
    """A shape holds what a lens must have in common with its model.

    Attributes:
        depth: The number of layers.
        width: D, the width of the hidden states.
        pooling: The token that the head reads: ``"first"``, ``"last"``, or ``"mean"`` of all.
    """

    depth: int
    width: int
    pooling: Pooling

    @classmethod
    def of(cls, spec: ModelSpec) -> Shape:
        """Return the shape of a model."""
        return cls(spec.depth, spec.width, spec.pooling)


class CrossEncoder(LayeredModel):
    """A cross-encoder has the head of a reranker, which is float32 whatever the compute dtype."""

    @property
    def shape(self) -> Shape:
        """The shape that a lens must have."""
        return Shape.of(self.spec)

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks in words on how scores come about, for traces."""
        listwise = _LISTWISE if self._parts.family.listwise else None
        return tuple(remark for remark in (self.spec.labels.remark, listwise) if remark is not None)

    def lossless(self) -> CrossEncoder | None:
        """Return the same model with the layers without 8 bits; None if they are not in memory."""
        if (found := self._parts.lossless) is None:
            return None
        parts = replace(self._parts, layers=found.layers, packing=found.packing, meter=Meter(), lossless=None)
        return CrossEncoder(parts)

    def score(self, states: Tensor, number: int) -> Tensor:
        """Read relevance scores with the model's own head.

        Args:
            states: The states that the head reads, float32 ``[N, D]``, after the norm before the head.
            number: The number of the layer that they come from.

        Returns:
            The scores, float32 ``[N]``; embeddings ``[N, E]`` if the model is listwise.
        """
        return self._parts.family.score(self.spec, self.head, states, number) / self.spec.temperature


class StoredCrossEncoder(StoredModel):
    """This class reads a stored reranker. The head of a model that is asked is the rows of the answers.

    Args:
        directory: See :class:`StoredModel`.
        cutoff_layers: The layer whose head gives the score; None for the last. The layers behind it are not read.
        how: See :class:`StoredModel`.

    Raises:
        ModelNotFoundError: See :class:`StoredModel`.
        UnsupportedModelError: See :class:`StoredModel`; or the model has no layer with a head but the last.
        ValueError: The layer has no head.
    """

    _head_dtype = torch.float32

    def __init__(self, directory: Path, *, cutoff_layers: int | None = None, **how: Any) -> None:
        self._cutoff = cutoff_layers
        super().__init__(directory, **how)

    def _check_family(self) -> None:
        if self._cutoff is None:
            return
        first, last = self.spec.first_head, self.spec.depth
        if "start_layer" not in self.config.fields:
            raise UnsupportedModelError(
                f"cutoff_layers={self._cutoff} is for models with heads behind several layers, such as "
                f"bge-reranker-v2-minicpm-layerwise; {self.directory} has one behind the last. Leave it out"
            )
        if not first <= self._cutoff <= last:
            raise ValueError(f"cutoff_layers={self._cutoff} must be a layer with a head, from {first} to {last}")
        self.spec = replace(self.spec, layers=self.spec.layers[: self._cutoff])
        self._cut = f" cutoff_layers={self._cutoff}"

    @property
    def shape(self) -> Shape:
        """The shape that a lens must have."""
        return Shape.of(self.spec)

    def sizes(self, window: int, packing: Packing | None = None) -> ModelSizes:
        """See :meth:`StoredModel.sizes`."""
        sizes = super().sizes(window, packing)
        # torch copies the keys and values of a decoder's longest sequence; see the attention of an encoder.
        return replace(sizes, keys=2 * sizes.keys) if self.spec.causal and not sizes.kernels else sizes

    def plan(self, window: int, budget: int, packing: Packing | None = None) -> MemoryPlan:
        """Spend a memory budget.

        Args:
            window: The number of tokens of the longest pair.
            budget: The budget in bytes.
            packing: How the layers are packed; None for without a loss.

        Raises:
            BudgetError: The budget is too small.
        """
        return make_plan(self.sizes(window, packing), budget)

    def require_file(self, packing: Packing) -> None:
        """Try whether layers in this packing can be streamed.

        Raises:
            StorageError: The companion file with packed layers is missing and cannot be written.
        """
        self._packed(packing).require_file()

    def load(
        self,
        plan: MemoryPlan | None,
        answers: tuple[int, int | None] | None = None,
        packing: Packing | None = None,
        *,
        lossless: bool = False,
        temperature: float = 1.0,
    ) -> CrossEncoder:
        """Read the weights.

        Args:
            plan: What to keep in memory; None for everything.
            answers: The tokens of yes and no, if the family asks a question; no may be None.
            packing: How the layers are packed; None for without a loss.
            lossless: Whether to read all layers without a loss as well, see :meth:`CrossEncoder.lossless`.
            temperature: The number that scores are divided by, beside the model's own.

        Raises:
            ModelNotFoundError: The files cannot be read.
            FileError: The companion file with packed layers is damaged, or belongs to other weights.
            StorageError: That file cannot be written.
        """
        # These layers come first, because the files are closed when all that is needed of them has been read.
        beside = self._lossless() if lossless else None
        rows = []
        if self.family.asks:
            assert answers is not None
            rows.append(self._answer_rows(answers))
        parts = self._load(plan, rows, packing)
        spec = replace(parts.spec, temperature=temperature * parts.spec.temperature)
        return CrossEncoder(replace(parts, spec=spec, lossless=beside))

    def _lossless(self) -> LosslessLayers:
        """Read all layers without a loss."""
        numbers, packing = tuple(self._layers), self._packing
        packed = None if packing is None else self._packed(packing)
        layers = self._resident(numbers, packed, None, aligned_buffer(PIECE))
        return LosslessLayers(dict(zip(numbers, layers, strict=True)), packing)

    def _head_shapes(self) -> dict[str, TensorShape]:
        # Which rows are the answers' is known only when the tokenizer has been read.
        return {} if self.family.asks else super()._head_shapes()

    def _head_by_role(self, named: Mapping[str, Tensor]) -> Weights:
        return {name: named[name] for name in _ANSWERS if name in named} or super()._head_by_role(named)

    def _match(
        self, stored: Mapping[str, StoredTensor], wanted: Mapping[str, TensorShape]
    ) -> dict[str, StoredTensor]:
        if self.family.asks:
            if (output := stored.get(OUTPUT)) is None:
                raise ModelNotFoundError(f"the weights in {self.directory} lack {OUTPUT}, which gives the score")
            if output.kind not in READABLE or output.shape[1:] != (self.spec.width,):
                raise UnsupportedModelError(
                    f"{output.path} stores {output.name} as {output.kind} {list(output.shape)}; it should be "
                    f"floats [tokens, {self.spec.width}]"
                )
            self._output = output
        behind = list(enumerate(self.config.spec.layers, 1))[self.spec.depth :]
        left_out = {name for number, layer in behind for name in layer_names(self.family, layer, number)}
        return super()._match({name: one for name, one in stored.items() if name not in left_out}, wanted)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return super()._shapes() | ({OUTPUT: self._output.shape} if self.family.asks else {})

    def _answer_rows(self, answers: tuple[int, int | None]) -> TensorGroup:
        """Return the rows of the output embedding that belong to the answers."""
        if (last := max(token or 0 for token in answers)) >= self._output.shape[0]:
            raise ModelNotFoundError(
                f"the tokenizer in {self.directory} has a token {last}, but the model's output embedding has only "
                f"{self._output.shape[0]} rows: the two belong to different models"
            )
        numbers = {name: token for name, token in zip(_ANSWERS, answers, strict=True) if token is not None}
        if self.adapter is not None:
            self.adapter = self.adapter.pick_rows(OUTPUT, numbers)
        rows = {name: self._output.row(number) for name, number in numbers.items()}
        changes = {} if self.adapter is None else self.adapter.changes
        return TensorGroup(self._checkpoint, rows, dict.fromkeys(rows, torch.float32), changes)
