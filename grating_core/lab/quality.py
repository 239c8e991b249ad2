"""This module measures what pruning a language model costs: perplexity, and the hit rate of a cache of columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import exp
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from grating_core.columns.cache import Caching, ColumnCache
from grating_core.columns.companion import KINDS, ColumnSizes, Kind
from grating_core.columns.masks import Shares, kept
from grating_core.lab.decoders import decoder_layers
from grating_core.lab.masked import MaskedMlp


@dataclass(frozen=True)
class Traffic:
    """Traffic counts the columns that all tokens used, and those that were in memory.

    Attributes:
        sizes: Sizes of the MLPs.
        tokens: Number of tokens.
        wanted: Number of columns that the tokens used, int64 ``[depth, 2]``, by layer and by kind.
        hits: Number of used columns that were in memory, int64 ``[depth, 2]``.
    """

    sizes: ColumnSizes
    tokens: int
    wanted: NDArray[np.int64]
    hits: NDArray[np.int64]

    def hit_rate(self, kind: Kind | None = None) -> float:
        """Return the share of the used columns that were in memory, for one kind or for both (None)."""
        chosen = slice(None) if kind is None else KINDS.index(kind)
        return float(self.hits[:, chosen].sum() / self.wanted[:, chosen].sum())

    @property
    def bytes_per_token(self) -> float:
        """The bytes of the companion file that are read for a token."""
        rows = np.array([self.sizes.row_bytes(kind) for kind in KINDS])
        return float(((self.wanted - self.hits) * rows).sum() / self.tokens)


@dataclass(frozen=True)
class Quality:
    """This class holds the quality of a model on a text.

    Attributes:
        perplexity: Perplexity: exp of the mean negative log-likelihood of a token.
        tokens: Number of tokens that were predicted.
        traffic: Traffic of the caches of :class:`CachedMlp`; None without caches.
    """

    perplexity: float
    tokens: int
    traffic: Traffic | None


def cut_windows(tokenizer: Any, text: str, length: int, count: int | None = None) -> Tensor:
    """Cut the beginning of a text into windows of equal length, int64 ``[W, length]``.

    Args:
        tokenizer: A tokenizer of transformers. A token that it puts before every text comes before every window.
        text: The text.
        length: Number of tokens of a window.
        count: Number of windows; None for all whole windows.

    Raises:
        ValueError: The text is too short.
    """
    if length < 2:
        raise ValueError(f"length={length!r} must be 2 or more: the first token of a window is not predicted")
    start: list[int] = tokenizer("")["input_ids"]
    start = start if start == [tokenizer.bos_token_id] else []
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    step = length - len(start)
    there = len(ids) // step
    wanted = there if count is None else count
    if there < max(1, wanted):
        raise ValueError(
            f"the text has {len(ids):,} tokens, too few for {max(1, wanted)} windows of {length}: take a longer "
            f"text or fewer tokens"
        )
    return torch.tensor([start + ids[i * step : (i + 1) * step] for i in range(wanted)])


@torch.inference_mode()
def evaluate(
    model: Any,
    windows: Tensor,
    *,
    shares: Sequence[Shares] | None = None,
    make: Callable[[Any, Shares], nn.Module] = MaskedMlp,
    show_progress: bool = False,
) -> Quality:
    """Measure the perplexity of a model whose MLPs are pruned.

    Args:
        model: A causal language model of transformers, in memory. This function leaves it unchanged.
        windows: Token ids, see :func:`cut_windows`.
        shares: Shares that each layer keeps; None for the dense model.
        make: Function that makes the pruned MLP from the dense MLP and its shares, such as :class:`CachedMlp`.
        show_progress: Whether to show a progress bar on standard error.

    Raises:
        UnsupportedModelError: The model has no gated MLPs.
        ValueError: The number of shares is not the number of layers.
    """
    layers = decoder_layers(model)
    if shares is not None and len(shares) != len(layers):
        raise ValueError(f"there are {len(shares)} shares for {len(layers)} layers: give one for each")
    stand_ins = [] if shares is None else [make(layer.mlp, own) for layer, own in zip(layers, shares, strict=True)]
    originals, losses = [layer.mlp for layer in layers], []
    try:
        for layer, stand_in in zip(layers, stand_ins or originals, strict=True):
            layer.mlp = stand_in
        for window in tqdm(windows, "Perplexity", unit="window", disable=not show_progress):
            ids = window[None].to(model.device)
            losses.append(float(model(input_ids=ids, labels=ids, use_cache=False).loss))
    finally:
        for layer, original in zip(layers, originals, strict=True):
            layer.mlp = original
    cached = [mlp for mlp in stand_ins if isinstance(mlp, CachedMlp)]
    traffic = None
    if cached:
        wanted, hits = np.stack([mlp.wanted for mlp in cached]), np.stack([mlp.hits for mlp in cached])
        traffic = Traffic(replace(cached[0].sizes, depth=len(cached)), windows.numel(), wanted, hits)
    return Quality(exp(sum(losses) / len(losses)), windows.numel() - len(windows), traffic)


class CachedMlp(nn.Module):
    """A cached MLP computes with the columns that its caches choose.

    Like :class:`MaskedMlp` it multiplies by all weights and saves nothing.

    Args:
        mlp: The dense MLP.
        shares: Shares that are kept.
        caching: Size and preference of the caches.
        orders: The column at each place of the tables of inputs and of products, int64.
        gaps: Bytes that the disk reads in the time that one more read takes, for each kind.
    """

    def __init__(
        self,
        mlp: Any,
        shares: Shares,
        caching: Caching,
        orders: Sequence[NDArray[np.int64]],
        gaps: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__()
        self.mlp = mlp
        counts = mlp.down_proj.out_features, mlp.down_proj.in_features
        self.sizes = ColumnSizes(1, *counts, mlp.down_proj.weight.dtype)
        self.wanted, self.hits = np.zeros((2, len(KINDS)), dtype=np.int64)
        self.caches = [
            caching.cache(count, kind, shares, gap / self.sizes.row_bytes(kind))
            for count, kind, gap in zip(counts, KINDS, gaps, strict=True)
        ]
        self._orders = orders
        self._kept = kept(counts[0], shares.inputs), kept(counts[1], shares.products)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the MLP's output ``[…, D]`` for an input of the same shape, whose tokens are in order."""
        mlp = self.mlp
        hidden = self._masked(0, hidden)
        product = mlp.act_fn(mlp.gate_proj(hidden)) * mlp.up_proj(hidden)
        output: Tensor = mlp.down_proj(self._masked(1, product))
        return output

    def _masked(self, kind: int, values: Tensor) -> Tensor:
        rows = values.float().cpu().numpy().reshape(-1, values.shape[-1])
        used, hits = choose_all(self.caches[kind], self._orders[kind], rows, self._kept[kind])
        self.wanted[kind] += used.sum()
        self.hits[kind] += hits
        return values.masked_fill(torch.from_numpy(~used).to(values.device).view(values.shape), 0)


def choose_all(
    cache: ColumnCache, order: NDArray[np.int64], values: NDArray[np.float32], count: int
) -> tuple[NDArray[np.bool_], int]:
    """Choose columns for many tokens.

    Args:
        cache: What says which columns are in memory.
        order: The column at each place of the table, int64 ``[columns]``.
        values: Values of the tokens, ``[T, columns]``.
        count: Number of columns to choose for each token.

    Returns:
        Which columns each token uses, ``[T, columns]``, and how many of those are in memory, for all tokens.
    """
    used, found = np.zeros(values.shape, dtype=bool), 0
    for token, row in enumerate(values):
        places, hits = cache.choose(row[order], count)
        used[token, order[places]] = True
        found += hits
    return used, found


def cached_mlps(
    caching: Caching, orders: Iterable[Sequence[NDArray[np.int64]]], gaps: tuple[int, int]
) -> Callable[[Any, Shares], CachedMlp]:
    """Return a function that makes the cached MLPs of a model, one layer after the other, see :func:`evaluate`.

    Args:
        caching: Size and preference of the caches.
        orders: The orders of each layer, see :class:`CachedMlp`.
        gaps: See :class:`CachedMlp`.
    """
    each = iter(orders)
    return lambda mlp, shares: CachedMlp(mlp, shares, caching, next(each), gaps)
