"""What can go wrong, beside a ``ValueError`` for a bad argument."""

from __future__ import annotations


class GratingError(Exception):
    """The base of every error that is grating's own."""


class ModelNotFoundError(GratingError):
    """A model name leads to no usable weights. The message says what was looked for, and where."""


class UnsupportedModelError(GratingError):
    """The weights exist but are of a kind that grating does not run. The message lists those that it does."""


class ScoreError(GratingError):
    """The model gave a score that is not a finite number, or logits that are not.

    The message of :meth:`Reranker.rerank` names the document's index.
    """


class PolicyError(GratingError):
    """A pruning policy broke its contract, such as dropping so many candidates that no top K is left."""


class LensError(GratingError):
    """A lens is missing or damaged, or belongs to other weights. The message says which and what to do."""


class CheckpointError(GratingError):
    """A model's file cannot be read, or not any more. The message names the file and the tensor.

    After one that was raised by a request, the next request works if the file is back.
    """


class ColumnsError(GratingError):
    """The companion file of columns is damaged, belongs to other weights, or cannot be written."""


class SpillError(GratingError):
    """There is no room, or no working disk, for hidden states that do not fit into the memory budget."""


class StorageError(GratingError, OSError):
    """A file cannot be written: no room, no right, no such place. The message names it, and the room it takes."""


class BudgetError(GratingError, ValueError):
    """A memory budget is too small for the model.

    Attributes:
        smallest: The smallest budget that works with these settings, in bytes.
        resident: The smallest budget with which nothing is streamed, in bytes.
    """

    def __init__(self, message: str, *, smallest: int, resident: int) -> None:
        super().__init__(message)
        self.smallest = smallest
        self.resident = resident


class TraceError(GratingError):
    """A file of recorded activations is damaged, or is of another model, text or number of tokens."""
