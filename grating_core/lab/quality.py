"""What pruning costs a language model: its perplexity, and how often the columns it wants are in a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import exp
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from grating_core.columns.cache import Caching
from grating_core.columns.companion import KINDS, ColumnSizes
from grating_core.columns.masks import MaskedMlp, Method, Shares, find_gated_mlp, kept
from grating_core.errors import UnsupportedModelError
from grating_core.lab.traffic import Traffic


@dataclass(frozen=True)
class Quality:
    """What was measured.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of a token.
        tokens: How many tokens were predicted.
        traffic: What went through the caches; None without.
    """

    perplexity: float
    tokens: int
    traffic: Traffic | None


def cut_windows(tokenizer: Any, text: str, length: int, count: int | None = None) -> Tensor:
    """The beginning of a text as windows of equal length, int64 ``[W, length]``.

    Args:
        tokenizer: Of transformers. A token that it puts before every text comes before every window.
        text: The text.
        length: Tokens of a window.
        count: How many windows; None for as many as there are whole ones.

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


def decoder_layers(model: Any) -> Any:
    """The layers of a causal language model of transformers, all with gated MLPs.

    Raises:
        UnsupportedModelError: It is none, or has other MLPs.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not layers:
        raise UnsupportedModelError(
            f"mlp_density is for decoders with gated MLPs, such as Llama, Qwen or Gemma; {type(model).__name__} "
            f"is none"
        )
    for layer in layers:
        find_gated_mlp(layer)
    return layers


@torch.inference_mode()
def evaluate(
    model: Any,
    windows: Tensor,
    *,
    shares: Sequence[Shares] | None = None,
    method: Method = "dip",
    caching: Caching | None = None,
    show_progress: bool = False,
) -> Quality:
    """The perplexity of a model whose MLPs are pruned.

    Args:
        model: A causal language model of transformers, in memory. It is as it was afterwards.
        windows: See :func:`cut_windows`. Caches carry over from one to the next.
        shares: What each layer keeps; None for the dense model.
        method: How it is chosen, see :class:`MaskedMlp`.
        caching: Choose by magnitude and by what is in memory, token after token. Only with ``method="dip"``.
        show_progress: Show a progress bar on standard error.

    Raises:
        UnsupportedModelError: The model has no gated MLPs.
        ValueError: The arguments do not fit each other.
    """
    layers = decoder_layers(model)
    if shares is not None and len(shares) != len(layers):
        raise ValueError(f"there are {len(shares)} shares for {len(layers)} layers: give one for each")
    if caching is not None and (shares is None or method != "dip"):
        raise ValueError("caching is for DIP: give shares, and leave method out")
    stand_ins: list[MaskedMlp | CachedMlp] = [
        MaskedMlp(layer.mlp, kept_here, method) if caching is None else CachedMlp(layer.mlp, kept_here, caching)
        for layer, kept_here in zip(layers, shares or (), strict=shares is not None)
    ]
    losses = []
    with _standing_in(layers, stand_ins):
        for window in tqdm(windows, "Perplexity", unit="window", disable=not show_progress):
            ids = window[None].to(model.device)
            losses.append(float(model(input_ids=ids, labels=ids, use_cache=False).loss))
    cached = [mlp for mlp in stand_ins if isinstance(mlp, CachedMlp)]
    traffic = _traffic(cached, windows.numel()) if cached else None
    return Quality(exp(sum(losses) / len(losses)), windows.numel() - len(windows), traffic)


@contextmanager
def _standing_in(layers: Any, stand_ins: Sequence[nn.Module]) -> Iterator[None]:
    originals = [layer.mlp for layer in layers]
    try:
        for layer, stand_in in zip(layers, stand_ins, strict=False):
            layer.mlp = stand_in
        yield
    finally:
        for layer, original in zip(layers, originals, strict=True):
            layer.mlp = original


class CachedMlp(nn.Module):
    """A gated MLP that computes with the columns a cache makes it choose.

    Like :class:`MaskedMlp` it multiplies by all weights and saves nothing. What a token uses depends on the tokens
    before it, so columns are chosen token after token; the products are computed for all tokens at once.

    Args:
        mlp: The dense one.
        shares: What is kept.
        caching: The caches of both kinds.
    """

    def __init__(self, mlp: Any, shares: Shares, caching: Caching) -> None:
        super().__init__()
        self.mlp = mlp
        counts = mlp.down_proj.out_features, mlp.down_proj.in_features
        self.sizes = ColumnSizes(1, *counts, mlp.down_proj.weight.dtype)
        self.wanted = np.zeros(len(KINDS), dtype=np.int64)
        self.hits = np.zeros(len(KINDS), dtype=np.int64)
        self._caches = [caching.cache(count, kind, shares) for count, kind in zip(counts, KINDS, strict=True)]
        self._kept = kept(counts[0], shares.inputs), kept(counts[1], shares.products)

    def forward(self, hidden: Tensor) -> Tensor:
        """The MLP's output ``[…, D]`` for its input of that shape, whose tokens come in their order."""
        mlp = self.mlp
        hidden = self._masked(0, hidden)
        product = mlp.act_fn(mlp.gate_proj(hidden)) * mlp.up_proj(hidden)
        output: Tensor = mlp.down_proj(self._masked(1, product))
        return output

    def _masked(self, kind: int, values: Tensor) -> Tensor:
        magnitudes = values.abs().float().cpu().numpy().reshape(-1, values.shape[-1])
        unused = np.ones(magnitudes.shape, dtype=bool)
        for token, row in enumerate(magnitudes):
            choice = self._caches[kind].choose(row, self._kept[kind])
            unused[token, choice.columns] = False
            self.wanted[kind] += len(choice.columns)
            self.hits[kind] += choice.hits
        return values.masked_fill(torch.from_numpy(unused).to(values.device).view(values.shape), 0)


def _traffic(mlps: Sequence[CachedMlp], tokens: int) -> Traffic:
    one = mlps[0].sizes
    sizes = ColumnSizes(len(mlps), one.width, one.products, one.dtype)
    return Traffic(sizes, tokens, np.stack([mlp.wanted for mlp in mlps]), np.stack([mlp.hits for mlp in mlps]))
