"""What can go wrong, beside a ``ValueError`` for a bad argument."""

from __future__ import annotations


class GratingError(Exception):
    """The base of every error that is grating's own."""


class ModelNotFoundError(GratingError):
    """A model name leads to no usable weights. The message says what was looked for, and where."""


class UnsupportedModelError(GratingError):
    """The weights exist but are of a kind that grating does not run. The message lists those that it does."""


class ScoreError(GratingError):
    """The model gave a score that is not a finite number. The message names the document's index."""


class PolicyError(GratingError):
    """A pruning policy broke its contract, such as dropping so many candidates that no top K is left."""
