"""Preferences that were fitted to a model lie in grating's cache, where loading the model finds them.

A file has the fits of one model, for one or more densities and shares of columns in memory.
:mod:`grating_core.lab.preference` makes them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from grating_core.arguments import INPUTS_PREFERENCE, PRODUCTS_PREFERENCE, check_share
from grating_core.columns.cache import Preference
from grating_core.errors import FileError
from grating_core.files.locks import locked
from grating_core.files.places import cache_directory, is_kept
from grating_core.files.reading import read_json
from grating_core.files.writing import replacing

USUAL = Preference(INPUTS_PREFERENCE, PRODUCTS_PREFERENCE)
"""The preference of a model without a fit."""
_FORMAT = "1"


@dataclass(frozen=True)
class Fit:
    """A fit is the preference that suits a model best at a density and a share of columns in memory.

    Attributes:
        density: Share of the MLPs' weights that a token uses, above 0 and at most 1.
        share: Share of the MLPs' weights that is in memory, above 0 and at most 1.
        preference: The preference.
    """

    density: float
    share: float
    preference: Preference


@dataclass(frozen=True)
class Preferences:
    """This class settles the preference of a model. What the user asked for comes before what was fitted.

    Attributes:
        inputs: γ of inputs that the user asked for; None for the fitted one.
        products: γ of products that the user asked for; None for the fitted one.
        fits: The fits of the model.
    """

    inputs: float | None = None
    products: float | None = None
    fits: Sequence[Fit] = ()

    def at(self, density: float, share: float) -> Preference:
        """Return the preference at a density and a share of columns in memory, from the fit that is nearest."""

        def distance(fit: Fit) -> float:
            return abs(fit.density - density) + abs(fit.share - share)

        found = min(self.fits, key=distance).preference if self.fits else USUAL
        return Preference(
            found.inputs if self.inputs is None else self.inputs,
            found.products if self.products is None else self.products,
        )


NOT_ASKED = Preferences()
"""The preferences of a model without a fit, where the user asked for none."""


def read_fits(fingerprint: str) -> list[Fit]:
    """Return the fits of a model; none if nobody has fitted a preference to it.

    Args:
        fingerprint: Identity of the model's weights, without an adapter.

    Raises:
        FileError: The file of the fits is damaged, or belongs to another model.
    """
    path = _path(fingerprint)
    return _read(path, fingerprint) if is_kept(path) else []


def keep_fits(fingerprint: str, fits: Sequence[Fit]) -> Path:
    """Keep fits of a model, in place of earlier ones for the same densities and shares, and return their file.

    Args:
        fingerprint: Identity of the model's weights, without an adapter.
        fits: The fits.

    Raises:
        FileError: The file of earlier fits is damaged, or belongs to another model.
        StorageError: The file cannot be written.
    """
    path = _path(fingerprint)
    with locked(path):
        earlier = read_fits(fingerprint)
        places = {(fit.density, fit.share): fit for fit in (*earlier, *fits)}
        fields = {
            "format": _FORMAT,
            "fingerprint": fingerprint,
            "fits": [asdict(places[place]) for place in sorted(places)],
        }
        data = json.dumps(fields, indent=1).encode()
        with replacing(path, len(data)) as file:
            file.write(data)
    return path


def _path(fingerprint: str) -> Path:
    return cache_directory() / "preferences" / f"{fingerprint[:16]}.json"


def _read(path: Path, fingerprint: str) -> list[Fit]:
    try:
        fields = read_json(path)
        if (fields["format"], fields["fingerprint"]) != (_FORMAT, fingerprint):
            raise ValueError("it belongs to another model, or comes from another release of grating")
        return [
            Fit(
                check_share("density", own["density"], "the density of a fit"),
                check_share("share", own["share"], "the share of columns in memory"),
                Preference(**{kind: check_share(kind, gamma, "γ") for kind, gamma in own["preference"].items()}),
            )
            for own in fields["fits"]
        ]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise FileError(
            f"{path} has no preferences of this model ({error}); delete it, and fit them again with "
            f"grating simulate --fit-preference"
        ) from error
