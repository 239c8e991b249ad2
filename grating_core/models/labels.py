"""The labels of a classifier, and which of them says that a document is relevant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from grating_core.errors import UnsupportedModelError

FIELDS: dict[str, Any] = {"num_labels": 2, "id2label": None, "problem_type": None}
"""The fields that say what labels a classifier has, with their defaults."""

_SHOWN = 5  # labels in a message

# Names of labels, as they are after _plain. Names that may say one thing or the other are not here.
_RELEVANT = {
    "relevant", "is relevant", "yes", "true", "positive", "label 1", "1", "match", "answer", "entailment",
    "is answer", "duplicate", "similar",
}  # fmt: skip
_OTHER = {
    "irrelevant", "not relevant", "non relevant", "nonrelevant", "no", "false", "negative", "label 0", "0",
    "no match", "not entailment", "non entailment", "not duplicate", "dissimilar", "unrelated",
}  # fmt: skip


@dataclass(frozen=True)
class Labels:
    """This class holds what the rows of a classifier are for. A model that is no classifier counts as one label.

    Attributes:
        names: The name of each label: one, or two.
        relevant: The label that says that a document is relevant.
        named: Whether the labels' names say which one that is.
    """

    names: tuple[str, ...] = ("",)
    relevant: int = 0
    named: bool = True

    def __len__(self) -> int:
        return len(self.names)

    def score(self, logits: Tensor) -> Tensor:
        """Return the relevance score, ``[N]``, of logits ``[N, labels]``.

        With two labels, this is the logit of the relevant one less that of the other: the logistic function of the
        score is then the softmax.
        """
        relevant = logits[:, self.relevant]
        return relevant if len(self) == 1 else relevant - logits[:, 1 - self.relevant]

    @property
    def remark(self) -> str | None:
        """A sentence that says how the score comes from two labels; None for one label."""
        if len(self) == 1:
            return None
        relevant, other = self.names[self.relevant], self.names[1 - self.relevant]
        why = "as their names say" if self.named else "the second one: their names do not say which is relevant"
        return f"the score is the logit of label {relevant!r} less that of {other!r}, {why}"


ONE = Labels()
"""The labels of a model with one score."""


def read_labels(path: Path, stated: Mapping[str, Any]) -> Labels:
    """Read the labels of a classifier.

    Args:
        path: The file that errors name.
        stated: The fields that the file has. As in transformers, names that are not as many as ``num_labels`` do
            not count, and without both fields there are two labels.

    Raises:
        UnsupportedModelError: The classifier has three labels or more, or two that do not exclude each other.
    """
    named = stated.get("id2label")
    given = {int(number): str(name) for number, name in (named or {}).items()}
    count = stated.get("num_labels", FIELDS["num_labels"] if named is None else len(given))
    given = given if len(given) == count else {}
    names = tuple(given.get(number, f"LABEL_{number}") for number in range(min(count, _SHOWN + 1)))
    if count not in (1, 2):
        shown = ", ".join(names[:_SHOWN]) + (", …" if count > _SHOWN else "")
        raise UnsupportedModelError(
            f"{path} describes {count} labels ({shown}), but a reranker needs one relevance score. Take a model "
            f"with one label, or with two of which one says that a document is relevant"
        )
    if count == 2 and stated.get("problem_type") == "multi_label_classification":
        raise UnsupportedModelError(
            f"{path} has problem_type='multi_label_classification' with two labels, {', '.join(names)}. They do "
            f"not exclude each other, so they give no relevance score. Take a model with one label"
        )
    return Labels(names) if count == 1 else _two(names)


def _two(names: tuple[str, ...]) -> Labels:
    """Return two labels: the relevant one by its name, or because the other's name excludes it, or the second."""
    plain = [_plain(name) for name in names]
    for known, shift in ((_RELEVANT, 0), (_OTHER, 1)):
        found = [number for number, name in enumerate(plain) if name in known]
        if len(found) == 1:
            return Labels(names, (found[0] + shift) % 2)
    return Labels(names, 1, named=False)


def _plain(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())
