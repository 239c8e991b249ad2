"""Perplexity under pruning against transformers, and cache-aware masks against a slow plain reference."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.perplexity import baseline_shares, make_mlp
from grating_core import UnsupportedModelError
from grating_core.columns.cache import Caching, Preference
from grating_core.columns.companion import KINDS
from grating_core.columns.masks import Shares, kept
from grating_core.lab.decoders import decoder_layers
from grating_core.lab.masked import MaskedMlp, find_gated_mlp
from grating_core.lab.quality import CachedMlp, cut_windows, evaluate
from tests.core.columns.conftest import TEXT

HALF = (Shares(0.5, 0.5),) * 5
DENSE = (Shares(1.0, 1.0),) * 5
ORDERS = tuple(np.random.default_rng(0).permutation(count) for count in (32, 48))


@pytest.fixture(scope="module")
def model(decoder_directory: Path) -> LlamaForCausalLM:
    # Doubles: sums of one token and of many must not differ so much that another column is chosen.
    return LlamaForCausalLM.from_pretrained(decoder_directory, dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def tokenizer(decoder_directory: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(decoder_directory)


@pytest.fixture(scope="module")
def windows(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    return cut_windows(tokenizer, TEXT, 48, 3)


@torch.inference_mode()
def transformers_perplexity(model: LlamaForCausalLM, windows: torch.Tensor) -> float:
    losses = [float(model(input_ids=window[None], labels=window[None]).loss) for window in windows]
    return math.exp(sum(losses) / len(losses))


class PlainCachedMlp(nn.Module):
    """One token after the other, with a set of what is held and a sorted list of what is used."""

    def __init__(self, mlp: nn.Module, shares: Shares, caching: Caching) -> None:
        super().__init__()
        self.mlp = mlp
        counts = mlp.down_proj.out_features, mlp.down_proj.in_features
        self.kept = kept(counts[0], shares.inputs), kept(counts[1], shares.products)
        self.caches = [caching.cache(count, kind, shares) for count, kind in zip(counts, KINDS, strict=True)]
        self.hits = [0, 0]

    def choose(self, kind: int, values: torch.Tensor) -> torch.Tensor:
        cache = self.caches[kind]
        held = set(ORDERS[kind][: cache.resident].tolist())
        worth = [abs(float(v)) * (1 if i in held else cache.preference) for i, v in enumerate(values)]
        chosen = sorted(range(len(worth)), key=lambda i: -worth[i])[: self.kept[kind]]
        self.hits[kind] += len(held & set(chosen))
        return torch.tensor([float(v) if i in chosen else 0.0 for i, v in enumerate(values)], dtype=values.dtype)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        outputs = []
        for token in hidden[0]:
            x = self.choose(0, token)
            h = nn.functional.silu(self.mlp.gate_proj.weight @ x) * (self.mlp.up_proj.weight @ x)
            outputs.append(self.mlp.down_proj.weight @ self.choose(1, h))
        return torch.stack(outputs)[None]


def cached(caching: Caching) -> Callable[[nn.Module, Shares], CachedMlp]:
    return partial(CachedMlp, caching=caching, orders=ORDERS)


@pytest.mark.parametrize("make", [MaskedMlp, cached(Caching(0.5, Preference(0.2, 0.2)))], ids=["masked", "cached"])
def test_density_1_is_exactly_the_dense_model(model, windows, make) -> None:
    dense = transformers_perplexity(model, windows)
    assert evaluate(model, windows).perplexity == dense
    assert evaluate(model, windows, shares=DENSE, make=make).perplexity == dense


@pytest.mark.parametrize("preference", [1.0, 0.2])
def test_cached_masks_are_those_of_a_plain_reference(model, windows, preference) -> None:
    caching = Caching(0.4, Preference(preference, preference))
    quality = evaluate(model, windows, shares=HALF, make=cached(caching))
    layers = decoder_layers(model)
    originals = [layer.mlp for layer in layers]
    plain = [PlainCachedMlp(mlp, HALF[0], caching) for mlp in originals]
    try:
        for layer, mlp in zip(layers, plain, strict=True):
            layer.mlp = mlp
        expected = transformers_perplexity(model, windows)
    finally:
        for layer, mlp in zip(layers, originals, strict=True):
            layer.mlp = mlp
    assert quality.perplexity == pytest.approx(expected, rel=1e-9)
    assert quality.tokens == 3 * 47
    np.testing.assert_array_equal(quality.traffic.hits, [mlp.hits for mlp in plain])
    np.testing.assert_array_equal(quality.traffic.wanted, [[16 * 144, 24 * 144]] * 5)
    missing = quality.traffic.wanted - quality.traffic.hits
    rows = quality.traffic.sizes.row_bytes("inputs"), quality.traffic.sizes.row_bytes("products")
    assert quality.traffic.bytes_per_token == pytest.approx(float((missing * rows).sum()) / 144)


def test_without_a_preference_caches_do_not_change_what_is_computed(model, windows) -> None:
    found = evaluate(model, windows, shares=HALF, make=cached(Caching(0.3))).perplexity
    assert found == pytest.approx(evaluate(model, windows, shares=HALF).perplexity, rel=1e-12)
    assert found != evaluate(model, windows).perplexity


def test_a_preference_raises_the_hit_rate_of_both_kinds(model, windows) -> None:
    plain, aware = (
        evaluate(model, windows, shares=HALF, make=cached(Caching(0.5, Preference(p, p)))).traffic
        for p in (1.0, 0.2)
    )
    for kind in ("inputs", "products", None):
        assert aware.hit_rate(kind) > plain.hit_rate(kind) + 0.1
    assert aware.bytes_per_token < plain.bytes_per_token


def test_the_kinds_may_have_preferences_of_their_own(model, windows) -> None:
    plain, aware = (
        evaluate(model, windows, shares=HALF, make=cached(Caching(0.5, Preference(1.0, p)))).traffic
        for p in (1.0, 0.2)
    )
    assert aware.hit_rate("products") > plain.hit_rate("products") + 0.1
    assert abs(aware.hit_rate("inputs") - plain.hit_rate("inputs")) < 0.05  # other products change later inputs


@pytest.mark.parametrize("method", ["glu", "gate", "up"])
def test_baselines_are_those_of_masked_mlps(model, windows, method) -> None:
    shares = (baseline_shares(method, 0.8),) * 5
    layers = decoder_layers(model)
    originals = [find_gated_mlp(layer) for layer in layers]
    try:
        for layer, mlp in zip(layers, originals, strict=True):
            layer.mlp = make_mlp(method)(mlp, shares[0])
        expected = transformers_perplexity(model, windows)
    finally:
        for layer, mlp in zip(layers, originals, strict=True):
            layer.mlp = mlp
    assert evaluate(model, windows, shares=shares, make=make_mlp(method)).perplexity == expected


def test_the_model_is_as_it_was_even_after_a_failure(model, windows) -> None:
    before = [layer.mlp for layer in decoder_layers(model)]
    evaluate(model, windows, shares=HALF)
    with pytest.raises(IndexError):
        evaluate(model, windows + 10_000, shares=HALF)
    assert all(layer.mlp is mlp for layer, mlp in zip(decoder_layers(model), before, strict=True))


def test_windows_are_the_beginning_of_a_text(tokenizer) -> None:
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert cut_windows(tokenizer, TEXT, 10, 4).flatten().tolist() == ids[:40]
    assert len(cut_windows(tokenizer, TEXT, 10)) == len(ids) // 10


def test_bad_input_is_refused(model, tokenizer, windows) -> None:
    with pytest.raises(ValueError, match="400 tokens, too few for 9 windows of 48"):
        cut_windows(tokenizer, TEXT, 48, 9)
    with pytest.raises(ValueError, match="length=1"):
        cut_windows(tokenizer, TEXT, 1)
    with pytest.raises(ValueError, match="4 shares for 5 layers"):
        evaluate(model, windows, shares=HALF[:4])
    with pytest.raises(ValueError, match=r"share=1\.5"):
        Caching(1.5)
    with pytest.raises(ValueError, match="preference for inputs, 0"):
        Preference(0, 0.5)
    with pytest.raises(ValueError, match=r"preference for products, 1\.2"):
        Preference(0.2, 1.2)
    bert = BertForMaskedLM(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9))
    with pytest.raises(UnsupportedModelError, match="BertForMaskedLM"):
        evaluate(bert, windows)
