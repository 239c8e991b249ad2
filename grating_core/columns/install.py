"""This module makes the MLPs of a model that compute from columns, as a density asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from grating_core.arguments import check_density
from grating_core.columns.allocation import allocate
from grating_core.columns.cache import Caching
from grating_core.columns.companion import KINDS, ColumnSizes, Kind, MlpWeights, write_columns
from grating_core.columns.disk import find_disk
from grating_core.columns.fetching import SLOTS, Fetcher, fetched_bytes
from grating_core.columns.masks import Shares
from grating_core.columns.mlp import ColumnMlp, ColumnTable, unpacked_bytes, unpacked_memory
from grating_core.columns.preference import NOT_ASKED, Preferences
from grating_core.columns.reading import ColumnFile
from grating_core.errors import UnsupportedModelError
from grating_core.files.places import is_there
from grating_core.layers.layer import Mlp
from grating_core.layers.spec import LayerSpec
from grating_core.memory.checkpoint import SECTOR, aligned_buffer
from grating_core.memory.meter import Meter

_FETCHED = 16 << 20  # bytes; larger was no faster


@dataclass(frozen=True)
class MlpPruning:
    """This class says how the MLPs of a model are pruned.

    Attributes:
        density: Share of the MLPs' weights that a token uses, above 0 and below 1.
        preferences: Preferences for columns that are in memory.
        bits: Bits of the MLPs' weights, 8 or 4; None for weights as they are.
        show_progress: Whether a progress bar is shown while the companion file is written.
    """

    density: float
    preferences: Preferences = NOT_ASKED
    bits: int | None = None
    show_progress: bool = False


def mlp_pruning(
    mlp_density: float | None, preferences: Preferences, *, bits: int | None = None, show_progress: bool = False
) -> MlpPruning | None:
    """Return the pruning for a density; None if the density asks for all weights.

    Raises:
        ValueError: The density is not a number above 0 and at most 1.
    """
    if mlp_density is None or check_density(mlp_density) == 1:
        return None
    return MlpPruning(mlp_density, preferences, bits, show_progress)


def column_sizes(specs: Sequence[LayerSpec], dtype: torch.dtype, bits: int | None = None) -> ColumnSizes:
    """Return the sizes of the MLPs of a model with these layers.

    Args:
        specs: The specs of all layers.
        dtype: Type of the weights.
        bits: Bits of a quantised weight, 8 or 4; None for weights in the dtype.

    Raises:
        UnsupportedModelError: A layer has no gated MLP.
    """
    for number, spec in enumerate(specs, 1):
        if not spec.gated:
            raise UnsupportedModelError(
                f"mlp_density is for models with gated MLPs, such as Llama, Qwen or Gemma; layer {number} of this "
                f"model has none. Leave mlp_density out"
            )
    return ColumnSizes(len(specs), specs[0].width, specs[0].inner, dtype, bits)


def staging_bytes(sizes: ColumnSizes) -> int:
    """Return the bytes of the memory that columns are read and unpacked into."""
    return fetching_bytes(sizes) + unpacked_bytes(sizes)


def fetching_bytes(sizes: ColumnSizes) -> int:
    """Return the bytes of the memory that columns are read into."""
    # A row may lie in two sectors more than it fills.
    largest = max(sizes.row_bytes(kind) for kind in KINDS) + 2 * SECTOR
    tables = max(sizes.count(kind) * sizes.row_bytes(kind) for kind in KINDS) + 2 * SECTOR
    return fetched_bytes(largest, min(_FETCHED, SLOTS * tables))


def open_columns(
    directory: Path,
    sizes: ColumnSizes,
    fingerprint: str,
    weights: Callable[[], Iterable[MlpWeights]],
    *,
    show_progress: bool,
) -> ColumnFile:
    """Open the companion file of a model, after writing it if there is none.

    Args:
        directory: Directory of all companion files.
        sizes: Sizes of the model's MLPs.
        fingerprint: Identity of the model's weights.
        weights: Function that yields the weights of each layer, see :func:`write_columns`.
        show_progress: Whether to show a progress bar while writing.

    Raises:
        FileError: The file is damaged, or belongs to other weights.
        StorageError: The file cannot be written.
    """
    form = str(sizes.dtype).removeprefix("torch.") if sizes.bits is None else f"{sizes.bits}bits"
    weighed = "-weighed" if sizes.bits == 4 else ""
    path = directory / f"{fingerprint[:16]}-{form}{weighed}-ordered.safetensors"
    if not is_there(path):
        write_columns(path, weights(), sizes, fingerprint, show_progress=show_progress)
    return ColumnFile(path, sizes, fingerprint)


def install(
    specs: Sequence[LayerSpec], file: ColumnFile, pruning: MlpPruning, share: float, meter: Meter
) -> tuple[list[Mlp], Fetcher]:
    """Return an MLP for each layer that computes from columns, and what reads them.

    Args:
        specs: The specs of all layers; see :func:`column_sizes`.
        file: Companion file of the model.
        pruning: How the MLPs are pruned.
        share: Share of each layer's MLP that fits into memory, from 0 to 1. This call reads that share.
        meter: Counter of columns, bytes and waiting.

    Raises:
        FileError: Columns cannot be read, or are damaged.
    """
    sizes = file.sizes
    if share < 1:
        file.disk = find_disk(file.path, file.measure)
    fetcher, unpacked = Fetcher(file, aligned_buffer(fetching_bytes(sizes)), meter), unpacked_memory(sizes)
    caching = Caching(share, pruning.preferences.at(pruning.density, share))
    each = allocate(pruning.density, len(specs))
    inputs, products = (
        [_table(fetcher, n, kind, caching, shares, unpacked, meter) for n, shares in enumerate(each, 1)]
        for kind in KINDS
    )
    following = [*inputs[1:], None]
    mlps: list[Mlp] = [ColumnMlp(*parts) for parts in zip(specs, inputs, products, each, following, strict=True)]
    meter.columns_read = meter.bytes_read = 0  # the meter counts requests, and not loading
    meter.seconds_waited = 0.0
    return mlps, fetcher


def _table(
    fetcher: Fetcher, number: int, kind: Kind, caching: Caching, shares: Shares, unpacked: Tensor, meter: Meter
) -> ColumnTable:
    """Make a table of columns, and read as many of them as fit."""
    sizes = fetcher.file.sizes
    cache = caching.cache(sizes.count(kind), kind, shares, fetcher.file.cost(kind))
    table = ColumnTable(fetcher, number, kind, cache, unpacked, meter)
    table.fill()
    return table
