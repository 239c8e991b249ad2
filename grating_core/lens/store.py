"""Lenses are kept on disk, each with its margins and a summary of its calibration."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as format_tensors
from torch import Tensor

from grating_core.errors import FileError, StorageError
from grating_core.files.locks import locked
from grating_core.files.places import cache_directory, go_on_without_cache, is_kept
from grating_core.files.reading import check_regular, read_json
from grating_core.files.writing import replacing, require_room
from grating_core.lens.features import LayerMap, Lens, compares_tokens, feature_count
from grating_core.lens.quantized import Agreement, agrees
from grating_core.models.cross_encoder import Shape
from grating_core.pruning import Margins

_TENSORS = "lens.safetensors"
_DESCRIPTION = "lens.json"
_FORMAT = 2
_BESIDE_MAPS = 1 << 18  # the most bytes of margins, names and the description
_WAY_OUT = "delete the directory, or calibrate again"
_FIELDS = {"fingerprint": str, "sha256": str, "pooling": str, "layers": int, "summary": dict}
_IN_8_BITS = ("int8.margins", "int8.recounts.margins")
_PACKAGED = Path(__file__).parent / "packaged"

_log = logging.getLogger("grating")


@dataclass(frozen=True)
class Summary:
    """A summary says what calibration measured, each time with a lens that had not seen the corpus.

    Attributes:
        requests: Number of requests that the lens was fitted on, and that the margins come from.
        corpora: Number of corpora that they are from.
        candidates: Number of candidates of most requests, and of those of the figures below.
        top_k: The K of the figures below.
        target: The promise of the figures below.
        agreement: Share of the full model's top K that was kept.
        compute_share: Tokens × layers computed, as a share of those without pruning.
        gammas: Goodman and Kruskal's γ between the estimates after each layer, from layer 0, and the final scores.
    """

    requests: int
    corpora: int
    candidates: int
    top_k: int
    target: float
    agreement: float
    compute_share: float
    gammas: tuple[float, ...]


@dataclass(frozen=True)
class Recounts:
    """This class holds what calibration measured of recounts, see :mod:`grating_core.pruning.recount`.

    Attributes:
        doubt: The distance from the bar within which scores in 8 bits are in doubt.
        agreement: Share of the top K of the model without 8 bits that is found with recounts, by K.
        margins: The margins for the model in 8 bits with recounts.
    """

    doubt: float
    agreement: Agreement
    margins: Margins


@dataclass(frozen=True)
class Int8:
    """This class holds what calibration measured of the model in 8 bits.

    Attributes:
        agreement: Share of the top K of the model without 8 bits that it has in its own top K, by K.
        margins: The margins for the model in 8 bits. They promise the top K of the model without 8 bits.
        recounts: What was measured of the model in 8 bits with recounts.
    """

    agreement: Agreement
    margins: Margins
    recounts: Recounts

    def agrees(self, *, alone: bool) -> bool:
        """Tell whether the model in 8 bits, alone or with recounts, may replace the model without them."""
        return agrees(self.agreement if alone else self.recounts.agreement)


@dataclass(frozen=True)
class CalibratedLens:
    """A calibrated lens has margins, and belongs to one model.

    Attributes:
        lens: The lens, which estimates the final score.
        margins: The margins, which say how far the estimates can be trusted.
        fingerprint: Identity of the model, see :func:`grating_core.models.identity.fingerprint`.
        summary: The measurements of calibration.
        int8: What was measured of the model in 8 bits; None if nothing was.
    """

    lens: Lens
    margins: Margins
    fingerprint: str
    summary: Summary
    int8: Int8 | None = None

    def to(self, device: torch.device) -> CalibratedLens:
        """Return the same object with the lens on a device."""
        return replace(self, lens=self.lens.to(device))

    def in_8_bits(self, *, alone: bool) -> CalibratedLens | None:
        """Return the same object with the margins for the model in 8 bits; None if there are none.

        Args:
            alone: Whether nothing is recounted.
        """
        if self.int8 is None:
            return None
        return replace(self, margins=self.int8.margins if alone else self.int8.recounts.margins)

    def save(self, directory: Path) -> None:
        """Write ``lens.safetensors`` and ``lens.json``. A lens that is there is replaced whole or not at all.

        Raises:
            StorageError: The directory cannot be written.
        """
        data = format_tensors(_tensors(self))
        description = {
            "format": _FORMAT,
            "fingerprint": self.fingerprint,
            "sha256": hashlib.sha256(data).hexdigest(),
            "pooling": self.lens.pooling,
            "layers": len(self.lens.maps),
            "summary": asdict(self.summary),
        }
        if self.int8 is not None:
            recounts = {"doubt": self.int8.recounts.doubt, "agreement": self.int8.recounts.agreement}
            description["int8"] = {"agreement": self.int8.agreement, "recounts": recounts}
        text = (json.dumps(description, indent=2) + "\n").encode()
        tensors, last = directory / _TENSORS, directory / _DESCRIPTION
        with locked(last), locked(tensors):
            # The description is written last. Its digest shows if the two files do not belong together.
            for path, content in ((tensors, data), (last, text)):
                with replacing(path, len(content)) as file:
                    file.write(content)

    @classmethod
    def load(cls, directory: Path) -> CalibratedLens:
        """Read what :meth:`save` wrote.

        Raises:
            FileError: The lens is missing or damaged.
        """
        description = _describe(directory)
        path = directory / _TENSORS
        try:
            check_regular(path)
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() != description["sha256"]:
                raise FileError(f"{path} is not the file that {_DESCRIPTION} describes: {_WAY_OUT}")
            tensors = parse_tensors(data)
            maps = [
                LayerMap(tensors[f"layer.{number}.weight"], tensors[f"layer.{number}.bias"])
                for number in range(description["layers"])
            ]
            margins = _read_margins(tensors, "margins", len(maps))
            summary = _read_summary(description["summary"], len(maps))
            int8 = None
            if (fields := description.get("int8")) is not None:
                int8 = _read_int8(fields, *(_read_margins(tensors, name, len(maps)) for name in _IN_8_BITS))
            return cls(Lens(maps, description["pooling"]), margins, description["fingerprint"], summary, int8)
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise _damaged(directory, error) from error


def find_lens(fingerprint: str, shape: Shape) -> CalibratedLens | None:
    """Find the lens of a model, calibrated here or packaged with grating; None if there is none.

    A lens that cannot be used is left out with one warning, because the user has not named it.

    Args:
        fingerprint: Identity of the model.
        shape: Shape of the model.
    """
    kept = _kept(fingerprint)
    for directory in (*kept, *sorted(_PACKAGED.glob("*/"))):
        try:
            if directory in kept or _describe(directory)["fingerprint"] == fingerprint:
                return open_lens(directory, shape, fingerprint)
        except (FileError, OSError) as error:
            warn_once(f"pruning goes on without a lens of this model: {error}")
    return None


def _kept(fingerprint: str) -> list[Path]:
    """Return the directory of the lens that was calibrated here, if there is one and the cache can be read."""
    try:
        directory = lens_directory(fingerprint)
    except StorageError as error:
        go_on_without_cache(error)
        return []
    return [directory] if is_kept(directory / _DESCRIPTION) else []


def open_lens(directory: Path, shape: Shape, fingerprint: str) -> CalibratedLens:
    """Read the lens in a directory, which has to belong to this model.

    Args:
        directory: Directory of the lens.
        shape: Shape of the model.
        fingerprint: Identity of the model.

    Raises:
        FileError: There is no lens, it is damaged, or it belongs to another model.
    """
    found = CalibratedLens.load(directory)
    if found.fingerprint != fingerprint:
        raise FileError(
            f"lens={str(directory)!r} was calibrated for other weights, or with another adapter or template "
            f"(its fingerprint is {found.fingerprint[:16]}…, and this model's is {fingerprint[:16]}…): calibrate "
            f"a lens for this model with 'grating calibrate', or leave the lens out"
        )
    try:
        found.lens.check(shape)
    except ValueError as error:
        raise _damaged(directory, error) from error
    return found


@lru_cache
def warn_once(message: str) -> None:
    """Log a warning, but only the first time in this process."""
    _log.warning(message)


def require_room_for_lens(directory: Path, shape: Shape) -> None:
    """Check, before anything is computed, that there is room for a lens.

    Args:
        directory: Directory of the lens.
        shape: Shape of the model.

    Raises:
        StorageError: There is no room, or nothing can be written there.
    """
    features = sum(
        feature_count(shape.width, compares_tokens(number, shape.depth)) for number in range(shape.depth)
    )
    require_room(directory / _TENSORS, 4 * features + _BESIDE_MAPS)


def lens_directory(fingerprint: str) -> Path:
    """Return the directory in which a lens that is calibrated here is kept."""
    return cache_directory() / "lenses" / fingerprint[:16]


def _tensors(calibrated: CalibratedLens) -> dict[str, Tensor]:
    tensors = {}
    for number, layer in enumerate(calibrated.lens.maps):
        tensors[f"layer.{number}.weight"] = layer.weight.contiguous()
        tensors[f"layer.{number}.bias"] = layer.bias
    sets = {"margins": calibrated.margins}
    if calibrated.int8 is not None:
        sets |= zip(_IN_8_BITS, (calibrated.int8.margins, calibrated.int8.recounts.margins), strict=True)
    for prefix, margins in sets.items():
        for name in Margins.__annotations__:
            tensors[f"{prefix}.{name}"] = torch.tensor(getattr(margins, name))
    return tensors


def _read_margins(tensors: Mapping[str, Tensor], prefix: str, layers: int) -> Margins:
    margins = Margins(**{name: tensors[f"{prefix}.{name}"].numpy() for name in Margins.__annotations__})
    if len(margins.drop) != layers:
        raise ValueError(f"it has {layers} layers, and margins for {len(margins.drop)}")
    return margins


def _read_int8(fields: dict[str, Any], margins: Margins, recounted: Margins) -> Int8:
    recounts = fields["recounts"]
    if not _is_number(doubt := recounts["doubt"]) or doubt < 0:
        raise ValueError(f"int8 has doubt={doubt!r}, which is no distance")
    return Int8(_read_agreement(fields), margins, Recounts(doubt, _read_agreement(recounts), recounted))


def _read_agreement(fields: dict[str, Any]) -> Agreement:
    agreement = {int(top_k): share for top_k, share in fields["agreement"].items()}
    if not all(_is_number(share) and 0 <= share <= 1 for share in agreement.values()):
        raise ValueError(f"int8 has the shares {agreement} as agreement")
    return agreement


def _describe(directory: Path) -> dict[str, Any]:
    path = directory / _DESCRIPTION
    try:
        description: dict[str, Any] = read_json(path)
        if description["format"] != _FORMAT:
            raise FileError(
                f"{path} has format {description['format']!r}, but this release reads {_FORMAT}: calibrate again"
            )
        for name, kind in _FIELDS.items():
            if type(description[name]) is not kind:
                raise TypeError(f"{name}={description[name]!r} is not of the type {kind.__name__}")
    except FileNotFoundError as error:
        raise FileError(
            f"there is no lens in {directory}, because it has no {_DESCRIPTION}: name another directory as lens, "
            f"or make one with 'grating calibrate'"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileError(f"{path} cannot be read as the description of a lens ({error!r}): {_WAY_OUT}") from error
    return description


def _read_summary(fields: dict[str, Any], layers: int) -> Summary:
    gammas = fields["gammas"]
    whole = [fields[name] for name in ("requests", "corpora", "candidates", "top_k")]
    shares = [fields[name] for name in ("target", "agreement", "compute_share")]
    if not all(type(number) is int and number > 0 for number in whole):
        raise ValueError(f"the summary has {whole} as numbers of requests, corpora, candidates and K")
    if len(gammas) != layers or not all(_is_number(number) for number in (*shares, *gammas)):
        raise ValueError(f"the summary has the shares {shares}, and the γ {gammas} for {layers} layers")
    return Summary(**fields | {"gammas": tuple(gammas)})


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _damaged(directory: Path, error: Exception) -> FileError:
    return FileError(f"the lens in {directory} cannot be read ({type(error).__name__}: {error}): {_WAY_OUT}")
