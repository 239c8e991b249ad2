"""A cross-encoder is a layered model whose head reads scores; here is its form on disk as well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grating_core.errors import ModelNotFoundError, UnsupportedModelError
from grating_core.memory.group import TensorGroup
from grating_core.memory.header import FLOATS, StoredTensor
from grating_core.memory.plan import MemoryPlan, make_plan
from grating_core.models.layered import LayeredModel
from grating_core.models.stored import OUTPUT, StoredModel


class Shape(NamedTuple):
    """A shape holds what a lens must have in common with its model.

    Attributes:
        depth: The number of layers.
        width: D, the width of the hidden states.
        pooling: The token that the head reads: ``"first"``, ``"last"``, or ``"mean"`` of all.
    """

    depth: int
    width: int
    pooling: str


class CrossEncoder(LayeredModel):
    """A cross-encoder has the head of a reranker, which is float32 whatever the compute dtype."""

    @property
    def pooling(self) -> str:
        """The token that the head reads: ``"first"`` or ``"last"``, or ``"mean"`` for the mean of all."""
        return self._family.pooling(self.module.config)

    @property
    def reads_one_token(self) -> bool:
        """Whether the head reads a single token of a sequence."""
        return self.pooling != "mean"

    @property
    def shape(self) -> Shape:
        """The shape that a lens must have."""
        return Shape(self.depth, self.width, self.pooling)

    def scoring_positions(self, lengths: Sequence[int]) -> Tensor:
        """Return the position on the token axis that the head reads for each of N sequences, int64 ``[N]``."""
        tokens = torch.tensor(lengths, dtype=torch.int64, device=self.device)
        ends = tokens.cumsum(0)
        return ends - 1 if self.pooling == "last" else ends - tokens

    def read_scores(self, number: int, hidden: Tensor, lengths: Sequence[int]) -> Tensor:
        """Read relevance scores with the model's own head, in float32 whatever the compute dtype.

        Args:
            number: The number of the layer that the states come from.
            hidden: Hidden states, ``[1, T, D]`` or longer; rows behind the sequences are ignored.
            lengths: Number of tokens of each of the N sequences; T is their sum. With :attr:`reads_one_token` a
                sequence may have its scoring position only.

        Returns:
            The scores, float32 ``[N]``.
        """
        if self.reads_one_token:
            states = self._norm(hidden[0, self.scoring_positions(lengths)].float())
        else:
            tokens = self._norm(hidden[0, : sum(lengths)].float())
            states = torch.stack([part.mean(0) for part in tokens.split(list(lengths))])
        return self._family.classify(self.module, states, number)[:, 0]


class StoredCrossEncoder(StoredModel):
    """This class reads a stored reranker. The head of a model that is asked is the rows of the answers."""

    _head_dtype = torch.float32

    @property
    def shape(self) -> Shape:
        """The shape that a lens must have."""
        return Shape(len(self._layers), self._tensors[self._table].shape[1], self.family.pooling(self._config))

    def plan(self, window: int, budget: int) -> MemoryPlan:
        """Spend a memory budget.

        Args:
            window: The number of tokens of the longest pair.
            budget: The budget in bytes.

        Raises:
            BudgetError: The budget is too small.
        """
        return make_plan(self.sizes(window), budget)

    def load(self, plan: MemoryPlan | None, answers: tuple[int, int | None] | None = None) -> CrossEncoder:
        """Read the weights.

        Args:
            plan: What to keep in memory; None for everything.
            answers: The tokens of yes and no, if the family asks a question; no may be None.

        Raises:
            ModelNotFoundError: The files cannot be read.
        """
        if not self.family.asks:
            return CrossEncoder(self._load(plan))
        assert answers is not None
        if answers[1] is None:
            self._module.lm_head.no = None
        return CrossEncoder(self._load(plan, [self._answer_rows(answers)]))

    def _build(self) -> Any:
        return self.family.build(self._config)

    def _match(self, stored: Mapping[str, StoredTensor], wanted: Mapping[str, Tensor]) -> dict[str, StoredTensor]:
        if self.family.asks:
            # Which rows are the answers' is known only when the tokenizer has been read.
            wanted = {name: parameter for name, parameter in wanted.items() if not name.startswith("lm_head.")}
            if (output := stored.get(OUTPUT)) is None:
                raise ModelNotFoundError(f"the weights in {self.directory} lack {OUTPUT}, which gives the score")
            if output.kind not in FLOATS or output.shape[1:] != (self._config.hidden_size,):
                raise UnsupportedModelError(
                    f"{output.path} stores {output.name} as {output.kind} {list(output.shape)}; it should be "
                    f"floats [tokens, {self._config.hidden_size}]"
                )
            self._output = output
        return super()._match(stored, wanted)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return super()._shapes() | ({OUTPUT: self._output.shape} if self.family.asks else {})

    def _answer_rows(self, answers: tuple[int, int | None]) -> TensorGroup:
        """Return the rows of the output embedding that belong to the answers."""
        if (last := max(token or 0 for token in answers)) >= self._output.shape[0]:
            raise ModelNotFoundError(
                f"the tokenizer in {self.directory} has a token {last}, but the model's output embedding has only "
                f"{self._output.shape[0]} rows: the two belong to different models"
            )
        numbers = {
            f"lm_head.{name}": token
            for name, token in zip(("yes", "no"), answers, strict=True)
            if token is not None
        }
        if self.adapter is not None:
            self.adapter = self.adapter.pick_rows(OUTPUT, numbers)
        rows = {name: self._output.row(number) for name, number in numbers.items()}
        changes = {} if self.adapter is None else self.adapter.changes
        return TensorGroup(self._checkpoint, rows, dict.fromkeys(rows, torch.float32), changes)
