"""This module decides, from one number, the memory budget, what stays in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

from grating_core.errors import BudgetError
from grating_core.memory.group import PIECE
from grating_core.memory.hidden import FILL

# The first rerank loads code and threads, and a request has lists. torch's own kernels keep buffers as well.
_RUNTIME = 28_000_000
_RUNTIME_OF_TORCH = 56_000_000
_FEWEST_ROWS = 1024
_SMALLEST_SLICE = 256  # tokens; with fewer, reading a layer's weights from memory is not worth it
_SMALLEST_PROMPT = 128  # tokens of a prompt that are computed at once
PASS_TOKENS = 16 * 1024  # with these, computing a layer takes far longer than reading its weights
_USUAL_HIDDEN = 64 * 512  # tokens whose hidden states get memory before resident weights do
LARGEST_WORK = 16_000_000  # bytes of intermediate results; larger slices were slower


@dataclass(frozen=True)
class ModelSizes:
    """This class holds the sizes of a model's parts in memory, in bytes unless a line says otherwise.

    Attributes:
        layers: Weights of each layer.
        bytes_read: Bytes that reading each layer takes from the disk.
        vocabulary: Number of rows of the embedding table.
        row: One row of the embedding table.
        rest: Weights that are always resident: the other tables, norms and the head.
        converted: Whether weights are converted while they are read, which takes a buffer.
        hidden: Hidden states of one token.
        work: The most bytes of intermediate results for one token.
        window: Number of tokens of the longest pair, or of the longest prompt with its continuation.
        keys: Keys and values of so many tokens: of one layer, or of all layers of a model that generates.
        table_needed: Whether the whole embedding table is always needed, because it is the output embedding too.
        columns: All columns of the MLPs, if those are pruned; ``layers`` then lacks these weights.
        staging: The buffer that columns are read into.
        kernels: What compiled kernels take for themselves; 0 if torch computes the layers.
        writing: What writing a file of packed layers or of columns takes, before the weights are in memory; 0 for
            no file.
    """

    layers: tuple[int, ...]
    bytes_read: tuple[int, ...]
    vocabulary: int
    row: int
    rest: int
    converted: bool
    hidden: int
    work: int
    window: int
    keys: int
    table_needed: bool = False
    columns: int = 0
    staging: int = 0
    kernels: int = 0
    writing: int = 0

    @property
    def runtime(self) -> int:
        """What code, threads and lists take, in bytes."""
        return _RUNTIME if self.kernels else _RUNTIME_OF_TORCH


@dataclass(frozen=True)
class MemoryPlan:
    """A plan says what a memory budget is spent on.

    Attributes:
        budget: The budget, in bytes.
        sizes: Sizes of the model's parts.
        resident: Numbers of the layers that stay in memory, from 1; the others are streamed.
        slice_tokens: The most tokens that are computed at once. A longer sequence is divided.
        embedding_rows: Number of rows of the embedding table in memory; all rows if the table is resident.
        hidden_tokens: The most tokens of a pass whose hidden states stay in memory. Larger ones are spilled.
        column_share: The share of each layer's MLP that stays in memory, if the MLPs are pruned.
        tokenizer: Bytes that the tokenizer took on top of the budget; None if it has not been loaded.
    """

    budget: int
    sizes: ModelSizes
    resident: tuple[int, ...]
    slice_tokens: int
    embedding_rows: int
    hidden_tokens: int
    column_share: float = 0.0
    tokenizer: int | None = None

    @property
    def streamed(self) -> tuple[int, ...]:
        """The numbers of the layers that are read for every pass."""
        return tuple(n for n in range(1, len(self.sizes.layers) + 1) if n not in self.resident)

    @property
    def table_resident(self) -> bool:
        """Whether the whole embedding table stays in memory."""
        return self.embedding_rows == self.sizes.vocabulary

    @property
    def pass_tokens(self) -> int:
        """The most tokens of several requests that go through the layers together; a larger request goes alone."""
        return max(self.hidden_tokens - FILL, PASS_TOKENS)

    @property
    def parts(self) -> dict[str, int]:
        """The bytes of each part of the plan, by purpose."""
        sizes = self.sizes
        streamed = [sizes.layers[number - 1] for number in self.streamed]
        parts = {
            "runtime": self.sizes.runtime,
            "head, norms and small tables": sizes.rest,
            "resident layers": sum(sizes.layers[number - 1] for number in self.resident),
            "two layer buffers": 2 * max(streamed, default=0),
            "conversion buffer": PIECE if sizes.converted else 0,
            "embedding rows": self.embedding_rows * sizes.row + 8 * sizes.vocabulary,
            "intermediate results": self.slice_tokens * sizes.work,
            "keys and values": sizes.keys,
            "hidden states": self.hidden_tokens * sizes.hidden,
        }
        if sizes.kernels:
            parts["kernels"] = sizes.kernels
        if sizes.columns:
            parts |= {"columns": int(self.column_share * sizes.columns), "arriving columns": sizes.staging}
        return parts

    @property
    def total(self) -> int:
        """The bytes of all parts: the expected peak of a rerank, less the memory after imports."""
        return sum(self.parts.values())

    def spills(self, tokens: int) -> bool:
        """Tell whether the hidden states of a pass with ``tokens`` tokens are kept on disk."""
        return tokens + FILL > self.hidden_tokens

    def bytes_read(self) -> int:
        """Return the bytes of weights that one pass reads from disk, without embedding rows."""
        return sum(self.sizes.bytes_read[number - 1] for number in self.streamed)

    def bytes_spilled(self, tokens: int) -> int:
        """Return the bytes of hidden states that one pass without pruning writes to disk, and reads back."""
        return (len(self.sizes.layers) - 1) * tokens * self.sizes.hidden if self.spills(tokens) else 0


def make_plan(sizes: ModelSizes, budget: int) -> MemoryPlan:
    """Spend a budget on a model.

    The parts that the model cannot run without come first. The others follow in the order of the reading and
    writing that a byte of memory saves: hidden states of a usual request, embedding rows, resident layers. The
    whole embedding table and more hidden states come last.

    Args:
        sizes: Sizes of the model's parts.
        budget: The budget, in bytes.

    Raises:
        BudgetError: The budget is too small; the error states the smallest that works.
    """
    tokens = tokens_of_slice(sizes.work)
    smallest = _smallest(sizes, budget, tokens, hidden_tokens=_three_spans(tokens))
    resident = replace(_everything(smallest, tokens), hidden_tokens=max(_USUAL_HIDDEN, _three_spans(tokens)))
    _check(smallest, resident, f"documents of up to {sizes.window:,} tokens")
    plan = _more_rows(smallest, 4 * _FEWEST_ROWS)
    plan = _more_hidden(plan, _USUAL_HIDDEN)
    plan = _more_rows(plan, sizes.vocabulary // 10)
    plan = _more_layers(plan)
    if not plan.streamed:
        table = replace(plan, embedding_rows=sizes.vocabulary)
        plan = table if table.total <= budget else plan
    return _more_hidden(plan, budget)


def tokens_of_slice(work: int) -> int:
    """Return the tokens of a slice, if each token has ``work`` bytes of intermediate results.

    Budgets do not change this number, so that the same products are computed with any budget.
    """
    return max(_SMALLEST_SLICE, LARGEST_WORK // work)


def make_generation_plan(sizes: ModelSizes, budget: int, max_length: int) -> MemoryPlan:
    """Spend a budget on a language model that generates.

    The parts that the model cannot run without come first, including keys and values of the longest text. Resident
    layers follow, because every other layer is read for each token. Larger slices and the whole embedding table
    come last.

    Args:
        sizes: Sizes of the model's parts, for texts of ``max_length``.
        budget: The budget, in bytes.
        max_length: The most tokens of a prompt together with its continuation.

    Raises:
        BudgetError: The budget is too small; the error states the smallest that works.
    """
    # Larger slices of a prompt read the columns of pruned MLPs less often, but leave less memory for columns.
    work = budget // 50 if sizes.columns else LARGEST_WORK
    fewest = min(_SMALLEST_PROMPT, max_length)
    largest = max(fewest, min(max_length, work // sizes.work))
    smallest = _smallest(sizes, budget, fewest, hidden_tokens=max_length)
    everything = _everything(smallest, largest)
    _check(smallest, everything, f"prompts with continuations of up to {max_length:,} tokens")
    plan = _more_layers(smallest)
    larger = replace(plan, slice_tokens=largest)
    plan = _more_columns(larger if larger.total <= budget else plan)
    return everything if everything.total <= budget else plan


def _smallest(sizes: ModelSizes, budget: int, slice_tokens: int, hidden_tokens: int) -> MemoryPlan:
    depth = len(sizes.layers)
    return MemoryPlan(
        budget=budget,
        sizes=sizes,
        # Two buffers would take as much as one or two layers.
        resident=_all_but(depth, depth if depth > 2 else 0),
        slice_tokens=slice_tokens,
        embedding_rows=sizes.vocabulary if sizes.table_needed else min(_FEWEST_ROWS, sizes.vocabulary),
        hidden_tokens=hidden_tokens,
    )


def _everything(smallest: MemoryPlan, slice_tokens: int) -> MemoryPlan:
    return replace(
        smallest,
        resident=_all_but(len(smallest.sizes.layers), 0),
        slice_tokens=slice_tokens,
        embedding_rows=smallest.sizes.vocabulary,
        column_share=1.0,
    )


def _check(smallest: MemoryPlan, resident: MemoryPlan, texts: str) -> None:
    # The first process with this model writes the packed layers into a file, within the budget as well.
    needed = max(smallest.total, smallest.sizes.runtime + smallest.sizes.writing)
    if needed > smallest.budget:
        raise BudgetError(
            f"memory_budget={smallest.budget:,} bytes is too small for this model, which needs "
            f"{-(-needed // 1_000_000)}MB for {texts}: give it that much, or a smaller max_length",
            smallest=needed,
            resident=max(resident.total, needed),
        )


def _room(plan: MemoryPlan, unit: int) -> int:
    """Return how many more units of so many bytes fit into the budget."""
    return (plan.budget - plan.total) // unit


def _more_rows(plan: MemoryPlan, wanted: int) -> MemoryPlan:
    possible = min(wanted, plan.sizes.vocabulary, plan.embedding_rows + _room(plan, plan.sizes.row))
    return replace(plan, embedding_rows=max(plan.embedding_rows, possible))


def _more_hidden(plan: MemoryPlan, wanted: int) -> MemoryPlan:
    possible = min(wanted, plan.hidden_tokens + _room(plan, plan.sizes.hidden))
    return replace(plan, hidden_tokens=max(plan.hidden_tokens, possible))


def _more_layers(plan: MemoryPlan) -> MemoryPlan:
    depth = len(plan.sizes.layers)
    for streamed in range(depth):
        richer = replace(plan, resident=_all_but(depth, streamed))
        if richer.total <= plan.budget:
            return richer
    return plan


def _more_columns(plan: MemoryPlan) -> MemoryPlan:
    if not plan.sizes.columns:
        return plan
    return replace(plan, column_share=min(1.0, _room(plan, 1) / plan.sizes.columns))


def _all_but(depth: int, streamed: int) -> tuple[int, ...]:
    """Return the resident layers. The streamed ones are spread evenly, which leaves most time to read each."""
    passing = {1 + number * depth // streamed for number in range(streamed)}
    return tuple(number for number in range(1, depth + 1) if number not in passing)


def _three_spans(tokens: int) -> int:
    """Return the tokens in memory when hidden states are spilled: three spans (see ``HiddenOnDisk``) with fill."""
    return 3 * (tokens + FILL)
