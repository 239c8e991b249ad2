"""The kernels in torch: what the compiled ones are tested against, and what computes where there are none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import pad

from grating_core.kernels.activations import ACTIVATIONS
from grating_core.kernels.groups import dequantized
from grating_core.kernels.operands import Finished, Lookup, Map, Norm, Rows, Then, Weight
from grating_core.kernels.packing import quantized_rows, unpacked

_FAR = 1e4  # from here on an activation is its argument, or one, and below zero it is zero, or minus one


def linear(
    x: Rows,
    weight: Weight,
    then: Then,
    *,
    gate: Weight | None = None,
    residual: Tensor | None = None,
    into: Tensor | None = None,
) -> Finished:
    """Compute ``norm(residual + factor * first_norm(activation(x @ weight + bias)))`` for each row.

    With a gate, the activation is that of ``x @ gate``, and multiplies ``x @ weight``. No row depends on another.

    Args:
        x: Int8 rows, for weights of int8; or states, for weights of their dtype, of int8 or of groups. What the
            entries of the latter two stand for is rounded to the dtype of the states.
        weight: The weight.
        then: What follows the product.
        gate: The gate's weight, of the same shape; None for none.
        residual: States ``[T, columns]``; None for none.
        into: Contiguous states for the output, of as many entries; None for new memory.

    Returns:
        What ``then`` asks for. A NaN in a row of x makes all that comes of the row NaN.
    """
    states = _product(x, weight)
    if gate is not None:
        states = states * _activated(_product(x, gate), then.activation)
    else:
        states = _activated(states, then.activation)
    if then.first_norm is not None:
        states = normed(states, then.first_norm)
    if residual is not None:
        states = residual.float() + then.factor * states
    total = states.to(then.states) if then.total else None
    if then.norm is not None:
        states = normed(states, then.norm)
    output = states.to(then.states) if then.output else None
    if output is not None and into is not None:
        output = into.copy_(output.view(into.shape))
    return Finished(
        total,
        output,
        _rows(states) if then.quantized else None,
    )


def chain(x: Rows, maps: tuple[Map, Map, Map], residual: Tensor) -> None:
    """Compute three maps one behind the other, as the second half of a layer has them.

    The second map takes the first one's int8 rows if they are asked for, and else its output; the third takes the
    second one's. The third's residual is the first one's total, or its output if no total is asked for.

    Args:
        x: Rows, as for :func:`linear`.
        maps: The maps, which ask for what the next ones take, and the last one for its output.
        residual: The first map's residual, states ``[T, columns]``. The last map's output takes its place.
    """
    found: list[Finished] = []
    for each in maps:
        if found:
            before = found[-1]
            states = None if before.output is None else Rows(before.output)
            rows = before.rows or states
            assert rows is not None
            x = rows
        if len(found) == 2:
            total = found[0].output if found[0].total is None else found[0].total
        else:
            total = None if found else residual
        found.append(linear(x, each.weight, each.then, gate=each.gate, residual=total))
    output = found[-1].output
    assert output is not None
    residual.copy_(output)


def normed_rows(
    states: Tensor, norm: Norm | None, *, output: bool, quantized: bool
) -> tuple[Tensor | None, Rows | None]:
    """Return the norm of states ``[T, width]``, as states and as int8 rows, each if it is asked for.

    Args:
        states: The states.
        norm: The norm; None for none.
        output: Whether states are asked for.
        quantized: Whether int8 rows are asked for.
    """
    found = states.float() if norm is None else normed(states.float(), norm)
    return found.to(states.dtype) if output else None, _rows(found.to(states.dtype)) if quantized else None


def turn_heads(states: Tensor, norm: Norm | None, cosine: Tensor | None, sine: Tensor | None) -> None:
    """Norm each head of states ``[T, heads, head size]``, and turn it by the angles of its token, in place.

    Args:
        states: The states; rows may have any stride.
        norm: The norm of each head; None for none.
        cosine: Cosines, float32 ``[T, head size / 2]``; None if nothing is turned.
        sine: Sines of the same shape.
    """
    found = states.float()
    if norm is not None:
        found = normed(found, norm)
    if cosine is not None and sine is not None:
        first, second = found.chunk(2, -1)
        cosine, sine = cosine[:, None], sine[:, None]
        found = torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)
    states.copy_(found)


def embed(lookups: Sequence[Lookup], factor: float, norm: Norm | None, output: Tensor) -> None:
    """Write ``norm(factor * first + second + …)`` for each token, of its rows of one to three tables.

    Args:
        lookups: The tables and rows. The tables have the dtype of the output.
        factor: The factor of the first table's rows.
        norm: The norm of the sum; None for none.
        output: The states that are written, ``[T, D]``; rows may have any stride.

    Raises:
        IndexError: A table lacks a row.
    """
    first, *others = lookups
    states = functional.embedding(first.rows, first.table).float() * factor
    for table, rows in others:
        states += functional.embedding(rows, table)
    output.copy_(states if norm is None else normed(states, norm))


def normed(states: Tensor, norm: Norm) -> Tensor:
    """Return the norm of float32 states ``[…, width]``."""
    if norm.kind == "layer":
        return functional.layer_norm(states, norm.weight.shape, norm.weight, norm.bias, norm.eps)
    scale = torch.rsqrt(states.square().mean(-1, keepdim=True) + norm.eps)
    return states * scale * (norm.weight + norm.offset)


def _product(x: Rows, weight: Weight) -> Tensor:
    """Return the product with its bias, float32 ``[T, columns]``."""
    if x.scale is None:
        found = x.data.float() @ dequantized(weight).to(x.data.dtype).float().t()
    else:
        assert weight.scale is not None
        assert weight.sums is not None
        matrix = unpacked(weight)
        # The product of int8 needs more than 16 rows in some releases of torch, and gives exact sums.
        entries = pad(x.data[:, : weight.inner], (0, 0, 0, max(0, 17 - len(x.data))))
        sums = torch._int_mm(entries.contiguous(), matrix.t().contiguous())[: len(x.data)]
        scale, middle = x.scale[:, :1], x.scale[:, 1:]
        found = sums.float() * (weight.scale[: weight.columns] * scale) + weight.sums[: weight.columns] * middle
    return found if weight.bias is None else found + weight.bias[: weight.columns]


def _activated(states: Tensor, name: str | None) -> Tensor:
    if name is None:
        return states
    # Far from zero, and at infinity, torch's activations overflow or give NaN.
    found = ACTIVATIONS[name](states.clamp(-_FAR, _FAR))
    return found if name == "tanh" else found.where(states < _FAR, states)


def _rows(states: Tensor) -> Rows:
    entries, scale = quantized_rows(states)
    return Rows(pad(entries, (0, -entries.shape[1] % 64)), scale)
