"""On CUDA one call attends for all spans of a slice: FlashAttention-2 (arXiv 2307.08691) on packed sequences."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from grating_core.kernels.operands import Seen, Span
from grating_core.layers.sending import numbers_of, sent
from grating_core.layers.spec import LayerSpec

_LARGEST_HEAD = 256  # entries of a head; a size has to be a multiple of 8 as well


class Packing(NamedTuple):
    """A packing says how N spans lie one behind the other. Its numbers are on the CPU, so nothing waits for them.

    Attributes:
        seen: Which of its keys each span is given.
        queries: Number of the first query of each span, and the number of all: ``[N + 1]``.
        keys: Number of the first key of each span, and the number of all: ``[N + 1]``.
        window: How many keys before and behind its own place a query sees; -1 for all. The last query of a span
            has the place of the span's last key.
    """

    seen: tuple[slice, ...]
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    window: tuple[int, int]


def serves(spec: LayerSpec, states: Tensor) -> bool:
    """Tell whether one call can attend for all spans of such a layer, with queries or keys like these."""
    return (
        states.is_cuda
        and states.dtype in (torch.bfloat16, torch.float16)
        and spec.softcap is None
        and spec.relative is None
        and spec.head_size <= _LARGEST_HEAD
        and spec.head_size % 8 == 0
        and _has_kernels(states.device)
    )


@cache
def _has_kernels(device: torch.device) -> bool:
    """Tell whether torch has the kernels for this GPU. AMD's differ in what they support, and were not tried."""
    if torch.version.hip is not None or not torch.backends.cuda.is_flash_attention_available():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def pack(spec: LayerSpec, spans: Sequence[Span]) -> Packing | None:
    """Put spans one behind the other.

    Args:
        spec: The layer's spec, without soft-capping.
        spans: The spans, at least one.

    Returns:
        The packing; None if rows lie between the spans, or if no single call has such a window.
    """
    counts = [span.length for span in spans]
    lengths = [span.keys for span in spans]
    queries = tuple(accumulate(counts, initial=0))
    if any(span.start != start for span, start in zip(spans, queries, strict=False)):
        return None
    seen = [slice(0, length) for length in lengths]
    before = behind = -1
    if spec.causal:
        seen = [slice(0, span.first + count) for span, count in zip(spans, counts, strict=True)]
        behind = 0
    if spec.window is not None and max(lengths) > spec.window:
        reach = spec.window - 1
        if spec.causal:
            before = reach
        elif counts == lengths:
            before = behind = reach
        elif max(counts) == 1:
            # A single query needs no window if it is given no other keys.
            ends = [(span.first - reach, span.first + reach + 1) for span in spans]
            seen = [slice(max(0, a), min(length, b)) for (a, b), length in zip(ends, lengths, strict=True)]
        else:
            return None
    keys = tuple(accumulate((part.stop - part.start for part in seen), initial=0))
    return Packing(tuple(seen), queries, keys, (before, behind))


def varlen_attention(
    spec: LayerSpec, query: Tensor, seen: Seen, spans: Sequence[Span], packing: Packing
) -> Tensor:
    """Attend within each span, in one call.

    Args:
        spec: The layer's spec.
        query: Queries of a slice, ``[T, heads, head size]``, of a kind that :func:`serves` takes.
        seen: Keys and values.
        spans: The spans.
        packing: How they lie one behind the other.

    Returns:
        The attention's output, ``[T, heads, head size]``; zero for rows behind the spans.
    """
    from torch.nn.attention.varlen import varlen_attn  # only needed here

    bounds = sent(torch.tensor([packing.queries, packing.keys], dtype=torch.int32), query.device)
    count = packing.queries[-1]
    attended = varlen_attn(
        query[:count],
        *packed(seen, spans, packing.seen),
        bounds[0],
        bounds[1],
        max(end - start for start, end in pairwise(packing.queries)),
        max(end - start for start, end in pairwise(packing.keys)),
        scale=spec.scaling,
        window_size=packing.window,
        enable_gqa=spec.heads != spec.key_heads,
        num_splits=1,  # otherwise the longest sequence decides how sums are split, and so how they are rounded
    )
    assert isinstance(attended, Tensor)
    fill = len(query) - count
    return pad(attended, (0, 0, 0, 0, 0, fill)) if fill else attended


def packed(seen: Seen, spans: Sequence[Span], parts: Sequence[slice]) -> tuple[Tensor, Tensor]:
    """Return a part of the keys of each span, one behind the other, and the values: views if they lie so already.

    Args:
        seen: Keys and values.
        spans: The spans.
        parts: The part of each span, among all keys that the span may see.
    """
    key, value = seen.key, seen.value
    before = 0
    if seen.shared is not None:
        key, value = torch.cat((seen.shared[0], key)), torch.cat((seen.shared[1], value))
        before = len(seen.shared[0])
    runs = []
    for span, part in zip(spans, parts, strict=True):
        runs.append(slice(min(part.start, span.shared), min(part.stop, span.shared)))
        own = before + span.place - span.shared
        runs.append(slice(own + max(part.start, span.shared), own + max(part.stop, span.shared)))
    runs = [run for run in runs if run.start < run.stop]
    if all(one.stop == following.start for one, following in pairwise(runs)):
        whole = slice(runs[0].start, runs[-1].stop)
        return key[whole], value[whole]
    index = sent(numbers_of(runs), key.device)
    return key.index_select(0, index), value.index_select(0, index)
