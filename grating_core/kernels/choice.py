"""Which kernels compute on this processor: the compiled ones, or those in torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from grating_core.kernels import columns, compiled, compiled_columns, reference, token
from grating_core.kernels.columns import Choice
from grating_core.kernels.compiled_reading import CompiledReading
from grating_core.kernels.loading import KernelsError, has, start
from grating_core.kernels.operands import Finished, Rows
from grating_core.kernels.reading import Reading

VARIABLE = "GRATING_KERNELS"
"""The environment variable that names the level to use, or is ``torch`` for none."""


@dataclass(frozen=True)
class Kernels:
    """This class holds the kernels that compute.

    Attributes:
        level: The name of the instructions that the compiled kernels use; None if torch computes.
        reason: Why torch computes, in one sentence; empty if it does not.
        linear: See :func:`grating_core.kernels.reference.linear`.
        chain: See :func:`grating_core.kernels.reference.chain`.
        normed_rows: See :func:`grating_core.kernels.reference.normed_rows`.
        turn_heads: See :func:`grating_core.kernels.reference.turn_heads`.
        embed: See :func:`grating_core.kernels.reference.embed`.
        add_columns: See :func:`grating_core.kernels.columns.add_columns`.
        unpack_columns: See :func:`grating_core.kernels.columns.unpack_columns`.
        choose: See :func:`grating_core.kernels.columns.choose`.
        reading: See :class:`grating_core.kernels.reading.Reading`.
        pack_in_place: See :func:`grating_core.kernels.compiled.pack_in_place`; None where torch computes.
        attention: See :func:`grating_core.kernels.compiled.attention`; None where torch computes.
        features: See :func:`grating_core.kernels.features.features`; None where torch computes.
        token: See :func:`grating_core.kernels.token_reference.token`; None where torch computes.
    """

    level: str | None
    reason: str
    linear: Callable[..., Finished]
    chain: Callable[..., None]
    normed_rows: Callable[..., tuple[Tensor | None, Rows | None]]
    turn_heads: Callable[..., None]
    embed: Callable[..., None]
    add_columns: Callable[..., None]
    unpack_columns: Callable[..., None]
    choose: Callable[..., Choice]
    reading: Callable[..., Reading | CompiledReading]
    pack_in_place: Callable[[Tensor], Tensor] | None = None
    attention: Callable[..., Tensor] | None = None
    features: Callable[..., Tensor] | None = None
    token: Callable[..., Tensor | None] | None = None

    def has(self, dtype: torch.dtype) -> bool:
        """Tell whether there are compiled products of this dtype."""
        return self.level is not None and has(dtype)


@cache
def kernels() -> Kernels:
    """Return the kernels of this process, which are chosen once."""
    wanted = os.environ.get(VARIABLE) or None
    if wanted == "torch":
        return _of_torch(f"The environment variable {VARIABLE} is 'torch'.")
    try:
        level = start(wanted)
    except KernelsError as error:
        return _of_torch(str(error))
    return Kernels(
        level,
        "",
        compiled.linear,
        compiled.chain,
        compiled.normed_rows,
        compiled.turn_heads,
        compiled.embed,
        compiled_columns.add_columns,
        compiled_columns.unpack_columns,
        compiled_columns.choose,
        CompiledReading,
        compiled.pack_in_place,
        compiled.attention,
        compiled.features,
        token.token,
    )


def _of_torch(reason: str) -> Kernels:
    return Kernels(
        None,
        reason,
        reference.linear,
        reference.chain,
        reference.normed_rows,
        reference.turn_heads,
        reference.embed,
        columns.add_columns,
        columns.unpack_columns,
        columns.choose,
        Reading,
    )
