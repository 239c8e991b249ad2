"""These are grating's errors, beside a ``ValueError`` for a bad argument."""

from __future__ import annotations


class GratingError(Exception):
    """All of grating's own errors are of this class."""


class ModelNotFoundError(GratingError):
    """A model name leads to no usable weights. The message says what grating looked for, and where."""


class UnsupportedModelError(GratingError):
    """The weights exist, but grating does not run their kind. The message lists the kinds that it runs."""


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


class FileError(GratingError):
    """A file that grating reads is missing, is damaged, or belongs to another model. The message names it.

    After a request has raised this error, the next request works if the file is back.
    """


class StorageError(GratingError, OSError):
    """A file cannot be written: no room, no right, no such place. The message names it, and the room it takes."""


class ScoreError(GratingError):
    """The model gave a score, or logits, that are not finite numbers.

    The message of :meth:`Reranker.rerank` names the document's index.
    """
