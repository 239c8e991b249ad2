"""The companion file of a model holds the columns of its gated MLPs, each in one piece that can be read alone.

A checkpoint stores W_u, W_g and W_d row by row, but a token needs columns. So grating writes the columns again,
as a safetensors file with two tables for each layer. A row of ``inputs`` is a column of W_u and that of W_g, which
are used together; a row of ``products`` is a column of W_d. The ``order`` of a table says which column each row
is: those that tokens use most come first. Rows may be quantised. They have checksums, and lie one behind the
other. They are read past the page cache in whole sectors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from grating_core.errors import StorageError
from grating_core.kernels.columns import RowFormat, pack_columns
from grating_core.memory.checkpoint import SECTOR
from grating_core.memory.companion import Contents, checksum, write_companion

Kind = Literal["inputs", "products"]
KINDS: tuple[Kind, Kind] = ("inputs", "products")

_AT_ONCE = 1 << 17  # entries that are transposed and quantised at a time
_COPIES = 160  # bytes for each of them: copies in float32, and what a heap in pieces cannot use again


@dataclass(frozen=True)
class ColumnSizes:
    """This class holds the sizes of a model's gated MLPs.

    Attributes:
        depth: Number of layers.
        width: D, the number of entries of an MLP's input and output.
        products: F, the number of entries of its gated product.
        dtype: Type of the weights.
        bits: Bits of a quantised weight, 8 or 4; None for weights in the dtype.
    """

    depth: int
    width: int
    products: int
    dtype: torch.dtype
    bits: int | None = None

    def count(self, kind: Kind) -> int:
        """Return the number of columns of one kind in each layer."""
        return self.width if kind == "inputs" else self.products

    def form(self, kind: Kind) -> RowFormat:
        """Return the format of a row: a column of W_u and one of W_g, or a column of W_d."""
        return RowFormat(2 * self.products if kind == "inputs" else self.width, self.dtype, self.bits)

    def row_bytes(self, kind: Kind) -> int:
        """Return the bytes of a row, in memory and in the companion file."""
        return self.form(kind).row_bytes

    @property
    def layer_bytes(self) -> int:
        """The bytes of all columns of a layer."""
        return sum(self.count(kind) * self.row_bytes(kind) for kind in KINDS)


class MlpWeights(NamedTuple):
    """This class holds the weights of a gated MLP, and how its columns are written.

    Attributes:
        up: W_u, ``[F, D]``, of any floating dtype.
        gate: W_g, likewise.
        down: W_d, ``[D, F]``.
        inputs: Which column of W_u and W_g each row is, int64 ``[D]``; None for the order as it is.
        products: Which column of W_d each row is, int64 ``[F]``; None for the order as it is.
        input_errors: How much squared errors of the entries of a column of W_u and W_g count, float32 ``[2 F]``;
            None for the same of all.
    """

    up: Tensor
    gate: Tensor
    down: Tensor
    inputs: NDArray[np.int64] | None = None
    products: NDArray[np.int64] | None = None
    input_errors: Tensor | None = None


def writing_bytes(sizes: ColumnSizes) -> int:
    """Return the bytes that writing a companion file takes beside the weights of a layer."""
    return _COPIES * min(max(_AT_ONCE, 2 * sizes.products, sizes.width), 2 * sizes.products * sizes.width)


def write_columns(
    path: Path,
    weights: Iterable[MlpWeights],
    sizes: ColumnSizes,
    fingerprint: str,
    *,
    show_progress: bool = False,
) -> None:
    """Write a companion file as a whole or not at all, unless another process has written it meanwhile.

    Args:
        path: The file.
        weights: The weights of each layer.
        sizes: Sizes of the model's MLPs.
        fingerprint: Identity of the model's weights.
        show_progress: Whether to show a progress bar on standard error.

    Raises:
        StorageError: There is no room for the file, or it cannot be written.
    """
    parts = _parts(weights, sizes, show_progress=show_progress)
    try:
        write_companion(path, contents(sizes), fingerprint, parts)
    except StorageError as error:
        raise StorageError(
            f"the companion file with the columns of the MLPs is missing, and {error}; or leave mlp_density out"
        ) from error


def _parts(weights: Iterable[MlpWeights], sizes: ColumnSizes, *, show_progress: bool) -> Iterator[memoryview]:
    """Yield the bytes of all rows, then of their checksums, and of the orders."""
    checks: list[int] = []
    orders: list[NDArray[np.int64]] = []
    layers = tqdm(weights, "Writing columns", sizes.depth, unit="layer", disable=not show_progress)
    for layer in layers:
        for kind in KINDS:
            order = layer.inputs if kind == "inputs" else layer.products
            orders.append(np.arange(sizes.count(kind)) if order is None else order)
            # All outputs of an MLP count the same.
            matrices, errors = (
                ((layer.up, layer.gate), layer.input_errors) if kind == "inputs" else ((layer.down,), None)
            )
            for rows in _rows(matrices, orders[-1], sizes.form(kind), errors):
                yield rows.data
                checks += [checksum(row) for row in rows]
    yield np.array(checks, dtype="<u8").data
    yield np.concatenate(orders).astype("<i8").data
    yield memoryview(bytes(SECTOR))


def tables(sizes: ColumnSizes) -> list[tuple[int, Kind]]:
    """Return the layer's number and the kind of each table, in the order of a companion file."""
    return [(number, kind) for number in range(1, sizes.depth + 1) for kind in KINDS]


def contents(sizes: ColumnSizes) -> Contents:
    """Return what a companion file has: all tables, checksums and orders of their rows, and a sector of fill.

    Whole sectors around the last row lie within the file because of the fill.
    """
    rows = {
        f"{number}.{kind}": ("U8", (sizes.count(kind), sizes.row_bytes(kind))) for number, kind in tables(sizes)
    }
    checks = {f"{number}.{kind}.checks": ("U64", (sizes.count(kind),)) for number, kind in tables(sizes)}
    orders = {f"{number}.{kind}.order": ("I64", (sizes.count(kind),)) for number, kind in tables(sizes)}
    return {**rows, **checks, **orders, "fill": ("U8", (SECTOR,))}


def _rows(
    matrices: tuple[Tensor, ...], order: NDArray[np.int64], form: RowFormat, errors: Tensor | None
) -> Iterator[NDArray[np.uint8]]:
    """Yield the rows of a table, uint8 ``[n, bytes]`` at a time."""
    step = max(1, _AT_ONCE // form.length)
    for start in range(0, len(order), step):
        some = torch.from_numpy(order[start : start + step])
        columns = torch.cat([matrix[:, some].T for matrix in matrices], dim=1)
        yield pack_columns(columns, form, errors)
