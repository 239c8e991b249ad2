"""Fitted preferences in grating's cache: which one a model takes, and how the file may be damaged."""

import json
from pathlib import Path

import pytest

from grating_core.columns.cache import Preference
from grating_core.columns.preference import USUAL, Fit, Preferences, keep_fits, read_fits
from grating_core.errors import FileError

MODEL = "0123456789abcdef" * 4
FITS = [Fit(0.5, 0.25, Preference(0.3, 0.5)), Fit(0.5, 0.75, Preference(0.7, 0.4))]


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRATING_CACHE", str(tmp_path))
    return tmp_path / "preferences" / "0123456789abcdef.json"


def test_a_model_without_fits_takes_the_usual_preference(file: Path) -> None:
    assert read_fits(MODEL) == []
    assert Preferences().at(0.5, 0.5) == USUAL
    assert not file.parent.exists()


def test_the_nearest_fit_counts() -> None:
    preferences = Preferences(fits=FITS)
    assert preferences.at(0.6, 0.3) == FITS[0].preference
    assert preferences.at(0.6, 0.6) == FITS[1].preference


def test_what_was_asked_for_comes_before_what_was_fitted() -> None:
    assert Preferences(inputs=0.8, fits=FITS).at(0.5, 0.25) == Preference(0.8, 0.5)
    assert Preferences(products=0.8, fits=FITS).at(0.5, 0.25) == Preference(0.3, 0.8)


def test_fits_are_kept_and_replaced(file: Path) -> None:
    assert keep_fits(MODEL, FITS[:1]) == file
    better, other = Fit(0.5, 0.25, Preference(0.2, 0.2)), FITS[1]
    keep_fits(MODEL, [other, better])
    assert read_fits(MODEL) == [better, other]
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", "0"),
        ("fingerprint", MODEL[:16] + "f" * 48),
        ("fits", 3),
        ("fits", ["dense"]),
        ("fits", [{"density": 0.5, "share": 0.5}]),
        ("fits", [{"density": 2, "share": 0.5, "preference": {"inputs": 0.5, "products": 0.5}}]),
        ("fits", [{"density": 0.5, "share": 0.5, "preference": {"inputs": 0, "products": 0.5}}]),
        ("fits", [{"density": 0.5, "share": 0.5, "preference": {"inputs": 0.5, "outputs": 0.5}}]),
        ("fits", [{"density": 0.5, "share": 0.5, "preference": "strong"}]),
    ],
)
def test_a_damaged_file_is_named(file: Path, field: str, value: object) -> None:
    keep_fits(MODEL, FITS)
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    for call in (lambda: read_fits(MODEL), lambda: keep_fits(MODEL, FITS)):
        with pytest.raises(FileError, match=rf"{file.name} has no preferences of this model .*delete it"):
            call()


def test_a_file_that_is_cut_off_is_named(file: Path) -> None:
    keep_fits(MODEL, FITS)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(FileError, match=file.name):
        read_fits(MODEL)
