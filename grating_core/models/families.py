"""These are the families that grating runs, by the names of their architectures."""

from __future__ import annotations

from grating_core.errors import UnsupportedModelError
from grating_core.models.decoders import DECODERS
from grating_core.models.encoders import ENCODERS
from grating_core.models.family import Family

FAMILIES: dict[str, Family] = {family.architecture: family for family in (*ENCODERS, *DECODERS)}


def find_family(architectures: list[str] | None) -> Family:
    """Return the family of a checkpoint, from the ``architectures`` field of its configuration.

    Raises:
        UnsupportedModelError: grating does not know the architecture; the message lists those that it knows.
    """
    for name in architectures or ():
        if name in FAMILIES:
            return FAMILIES[name]
    raise UnsupportedModelError(
        f"the model has architectures={architectures!r}; supported are "
        f"{', '.join(FAMILIES)}; classifiers must have one label"
    )
