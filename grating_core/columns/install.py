"""What is asked for when a model's MLPs are pruned, and how it is put into the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from grating_core.columns.allocation import allocate, check_density
from grating_core.columns.cache import Caching, Preference
from grating_core.columns.companion import KINDS, ColumnFile, ColumnSizes, write_columns
from grating_core.columns.masks import find_gated_mlp
from grating_core.columns.mlp import ColumnMlp, ColumnTable, Staging
from grating_core.files.places import is_there
from grating_core.memory.meter import Meter

# Of the preferences that find 10 % more, this one costs SmolLM2-135M-Instruct least: see benchmarks/perplexity.py.
# The paper has 0.2 for both.
PREFERENCE = Preference(inputs=0.9, products=0.3)
_STAGING = 32_000_000  # bytes; larger was no faster
_FEWEST_STAGED = 2  # columns of the larger kind in each half

Weights = Iterator[tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class MlpPruning:
    """How the MLPs of a model are pruned.

    Attributes:
        density: Share of their weights that a token uses, above 0 and below 1.
        preference: For columns that are in memory.
        show_progress: Show a progress bar while the companion file is written.
    """

    density: float
    preference: Preference = PREFERENCE
    show_progress: bool = False


def mlp_pruning(mlp_density: float | None, *, show_progress: bool) -> MlpPruning | None:
    """What a density asks for; None where it asks for all weights.

    Raises:
        ValueError: It is not a number above 0, 1 at most.
    """
    if mlp_density is None or check_density(mlp_density) == 1:
        return None
    return MlpPruning(mlp_density, show_progress=show_progress)


def staging_bytes(sizes: ColumnSizes) -> int:
    """Memory in which columns arrive."""
    largest = max(sizes.row_bytes(kind) for kind in KINDS)
    tables = max(sizes.count(kind) * sizes.row_bytes(kind) for kind in KINDS)
    return max(2 * _FEWEST_STAGED * largest, min(_STAGING, 2 * tables))


def open_columns(
    directory: Path, sizes: ColumnSizes, fingerprint: str, weights: Callable[[], Weights], *, show_progress: bool
) -> ColumnFile:
    """The companion file of a model, written first if it is not there.

    Args:
        directory: Where such files are kept.
        sizes: Of the model.
        fingerprint: Of its weights.
        weights: Gives W_u, W_g and W_d of each layer.
        show_progress: Show a progress bar while writing.

    Raises:
        FileError: It cannot be written, is damaged, or belongs to other weights.
    """
    path = directory / f"{fingerprint[:16]}-{str(sizes.dtype).removeprefix('torch.')}.safetensors"
    if not is_there(path):
        write_columns(path, weights(), sizes, fingerprint, show_progress=show_progress)
    return ColumnFile(path, sizes, fingerprint)


def install(
    layers: Sequence[nn.Module], file: ColumnFile, pruning: MlpPruning, share: float, meter: Meter
) -> None:
    """Put MLPs that compute from columns into the place of those of a model.

    Args:
        layers: The model's.
        file: Its companion file.
        pruning: What a token uses.
        share: Of each layer's MLP, how much finds room in memory; that is read.
        meter: Told of columns, bytes and waiting.

    Raises:
        FileError: Columns cannot be read, or are damaged.
    """
    sizes = file.sizes
    staging = Staging(staging_bytes(sizes), sizes)
    caching = Caching(share, pruning.preference)
    for number, (layer, shares) in enumerate(zip(layers, allocate(pruning.density, len(layers)), strict=True), 1):
        tables = {}
        for kind in KINDS:
            cache = caching.cache(sizes.count(kind), kind, shares)
            tables[kind] = ColumnTable(file, number, kind, cache, staging, meter)
            tables[kind].fill()
        layer.mlp = ColumnMlp(find_gated_mlp(layer), tables["inputs"], tables["products"], shares)
    meter.columns_read = meter.bytes_read = 0  # requests are counted, not loading
    meter.seconds_waited = 0.0
