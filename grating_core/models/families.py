"""These are the families that grating runs, by the names of their architectures."""

from __future__ import annotations

from dataclasses import replace

from grating_core.errors import UnsupportedModelError
from grating_core.models.deberta import DEBERTA
from grating_core.models.decoders import DECODERS
from grating_core.models.encoders import ENCODERS
from grating_core.models.family import Family
from grating_core.models.gemma import GEMMAS
from grating_core.models.labels import FIELDS as LABELS
from grating_core.models.listwise import LISTWISE
from grating_core.models.modernbert import MODERNBERT
from grating_core.models.remote import REMOTE

FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (*ENCODERS, *REMOTE, MODERNBERT, DEBERTA, *DECODERS, *GEMMAS, LISTWISE)
}

_CLASSIFIER = "ForSequenceClassification"


def _headless(family: Family) -> Family:
    """Return the family of a classifier without its head."""
    defaults = {name: value for name, value in family.defaults.items() if name not in LABELS}
    return replace(family, defaults=defaults, head={}, variants=tuple(map(_headless, family.variants)))


def _base(family: Family) -> Family:
    """Return the family of a classifier's transformer alone, with the same names of tensors but no prefix."""
    prefix = f"{family.layers.partition('.')[0]}."
    return replace(
        _headless(family),
        architecture=f"{family.architecture.removesuffix(_CLASSIFIER)}Model",
        layers=family.layers.removeprefix(prefix),
        outside={name.removeprefix(prefix): role for name, role in family.outside.items()},
        variants=tuple(map(_base, family.variants)),
    )


BASES: dict[str, Family] = {
    base.architecture: base
    for base in (_base(family) for name, family in FAMILIES.items() if name.endswith(_CLASSIFIER))
}
"""Transformers without a head. Modules of sentence-transformers may be their head."""


def find_transformer(architectures: list[str] | None) -> Family:
    """Return the family of a checkpoint, without the head that its architecture may have.

    Args:
        architectures: The field of the checkpoint's configuration.

    Raises:
        UnsupportedModelError: grating does not know the architecture; the message lists those that it knows.
    """
    for name in architectures or ():
        if name in BASES:
            return BASES[name]
        if (family := FAMILIES.get(f"{name.partition('For')[0]}{_CLASSIFIER}")) is not None:
            return _headless(family)
    raise UnsupportedModelError(
        f"the model has architectures={architectures!r} below modules of sentence-transformers; supported are "
        f"{', '.join(BASES)}"
    )


def find_family(architectures: list[str] | None) -> Family:
    """Return the family of a checkpoint, from the ``architectures`` field of its configuration.

    Raises:
        UnsupportedModelError: grating does not know the architecture, or it has no head; the message lists those
            that grating knows.
    """
    for name in architectures or ():
        if name in FAMILIES:
            return FAMILIES[name]
        if name in BASES:
            raise UnsupportedModelError(
                f"the model has architectures={architectures!r}: it is a base model or one that makes embeddings, "
                f"and has no head that gives a score. Take a reranker, whose architecture ends in {_CLASSIFIER}"
            )
        if name.endswith("ForConditionalGeneration"):
            raise UnsupportedModelError(
                f"the model has architectures={architectures!r}: it reads with an encoder and writes its answer "
                f"with a decoder, as monoT5 does, which grating does not run. Take a cross-encoder"
            )
    raise UnsupportedModelError(
        f"the model has architectures={architectures!r}; supported are {', '.join(FAMILIES)}"
    )
