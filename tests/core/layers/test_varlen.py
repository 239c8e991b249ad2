"""The packing of spans for CUDA, on the CPU: beside torch's function stands a reference of the same signature."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import varlen as torch_varlen
from torch.nn.functional import scaled_dot_product_attention

from grating_core.kernels.operands import Seen, Span
from grating_core.layers import attention
from grating_core.layers.attention import attend, ragged_attention
from grating_core.layers.sending import numbers_of
from grating_core.layers.spec import LayerSpec, Norm
from grating_core.layers.varlen import pack, packed, serves, varlen_attention
from tests.core.parity import load

HEADS, SIZE = 4, 8
SPEC = LayerSpec(
    width=32, heads=HEADS, key_heads=HEADS, head_size=SIZE, inner=4, norm=Norm("layer", 1e-5), activation="gelu",
    gated=False, scaling=0.3,
)  # fmt: skip


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    num_splits: int | None = None,
) -> Tensor:
    """What ``torch.nn.attention.varlen.varlen_attn`` is documented to compute, for any device and dtype.

    The last query of a sequence stands at the sequence's last key, as in FlashAttention from 2.1 on.
    """
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert cu_seq_q.is_contiguous()
    assert cu_seq_k.is_contiguous()
    assert (len(query), len(key), len(value)) == (cu_seq_q[-1], cu_seq_k[-1], cu_seq_k[-1])
    assert (max_q, max_k) == (cu_seq_q.diff().max(), cu_seq_k.diff().max())
    assert (cu_seq_q.diff().min() > 0, cu_seq_k.diff().min() > 0) == (True, True)
    before, behind = (max_k + max_q if reach < 0 else reach for reach in window_size)
    output = torch.empty_like(query)
    for (first, last), (start, end) in zip(pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True):
        asks = torch.arange(end - start - (last - first), end - start)[:, None]
        told = torch.arange(end - start)
        mask = (told >= asks - before) & (told <= asks + behind)
        states = (query[first:last], key[start:end], value[start:end])
        output[first:last] = scaled_dot_product_attention(
            *(one.transpose(0, 1)[None] for one in states), attn_mask=mask, scale=scale, enable_gqa=enable_gqa
        )[0].transpose(0, 1)
    return output


def test_the_reference_has_the_signature_of_torch() -> None:
    theirs = inspect.signature(torch_varlen.varlen_attn).parameters
    ours = inspect.signature(varlen_attn).parameters
    assert {name: theirs[name].kind for name in ours} == {name: one.kind for name, one in ours.items()}
    assert list(theirs)[:7] == list(ours)[:7]


Calls = list[tuple[int, int]]
"""The numbers of queries and of sequences of each call."""


@contextmanager
def reference() -> Iterator[Calls]:
    """Puts the reference in the place of torch's function."""
    calls: Calls = []

    def noted(
        query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, *others: object, **how: object
    ) -> Tensor:
        calls.append((len(query), len(cu_seq_q) - 1))
        return varlen_attn(query, key, value, cu_seq_q, *others, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_varlen, "varlen_attn", noted)
        yield calls


def random_states(tokens: int, heads: int) -> Tensor:
    chance = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, heads, SIZE, generator=chance)


def plain(spec: LayerSpec, query: Tensor, seen: Seen, spans: list[Span]) -> Tensor:
    """The same spans, one after another, by the path of torch."""
    found = []
    for span in spans:
        states = (one.transpose(0, 1) for one in (query[span.rows], *seen.of(span)))
        found.append(attend(spec, *states, span.first).transpose(0, 1))
    return torch.cat(found)


RULES = {
    "key_heads": st.sampled_from([1, 2, 4]),
    "window": st.sampled_from([None, 1, 2, 8, 39, 40]),
    "causal": st.booleans(),
}


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    asked=st.sampled_from(["all", "first", "last", "some"]),
    fill=st.integers(0, 3),
    rules=st.fixed_dictionaries(RULES),
    seed=st.integers(0, 2**31),
)
def test_one_call_attends_as_span_by_span(
    lengths: list[int], asked: str, fill: int, rules: dict[str, object], seed: int
) -> None:
    """Queries of whole sequences, of one token of each, and of any part of each."""
    spec = replace(SPEC, **rules)
    chance = torch.Generator().manual_seed(seed)
    key = random_states(sum(lengths) + fill, spec.key_heads)
    seen = Seen(key, key.flip(0))
    spans, start, row = [], 0, 0
    for length in lengths:
        first = int(torch.randint(length, (), generator=chance))
        count = 1 + int(torch.randint(length - first, (), generator=chance))
        first, count = {"all": (0, length), "first": (0, 1), "last": (length - 1, 1), "some": (first, count)}[
            asked
        ]
        spans.append(Span(row, count, first, length, start))
        start, row = start + length, row + count
    query = random_states(row + fill, HEADS)
    packing = pack(spec, spans)
    if packing is None:  # a window before and behind the queries of some part
        assert asked == "some"
        assert spec.window is not None
        assert not spec.causal
        return
    with reference() as calls:
        output = varlen_attention(spec, query, seen, spans, packing)
    torch.testing.assert_close(output[:row], plain(spec, query, seen, spans), atol=1e-5, rtol=1e-5)
    assert output.shape == (row + fill, HEADS, SIZE)
    assert not output[row:].any()
    assert calls == [(row, len(lengths))]


@given(
    shared=st.integers(1, 20),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    prefix=st.booleans(),
    rules=st.fixed_dictionaries(RULES),
)
def test_sequences_with_a_shared_prefix_are_packed_by_one_index(
    shared: int, lengths: list[int], prefix: bool, rules: dict[str, object]
) -> None:
    """The slice may begin with the prefix itself."""
    spec = replace(SPEC, **rules | {"causal": True})
    before = random_states(shared, spec.key_heads)
    own = random_states(sum(lengths) + shared * prefix, spec.key_heads)
    seen = Seen(own, own.flip(0), (before, before.flip(0)))
    spans = [Span(0, shared, 0, shared, 0)] if prefix else []
    for length in lengths:
        start = spans[-1].rows.stop if spans else 0
        spans.append(Span(start, length, shared, shared + length, start, shared))
    packing = pack(spec, spans)
    assert packing is not None
    expected = [torch.cat(parts) for parts in zip(*map(seen.of, spans), strict=True)]
    for found, states in zip(packed(seen, spans, packing.seen), expected, strict=True):
        assert torch.equal(found, states)
    query = random_states(len(own) + 1, HEADS)
    with reference():
        output = varlen_attention(spec, query, seen, spans, packing)
    torch.testing.assert_close(output[: len(own)], plain(spec, query, seen, spans), atol=1e-5, rtol=1e-5)


def test_keys_are_packed_without_a_copy_where_they_lie_one_behind_the_other() -> None:
    seen = Seen(random_states(20, 2), random_states(20, 2).flip(0))
    spans = [Span(0, 1, 0, 1, 3), Span(1, 5, 0, 5, 4), Span(6, 11, 0, 11, 9)]
    whole = [slice(0, span.keys) for span in spans]
    for found, states in zip(packed(seen, spans, whole), seen[:2], strict=True):
        assert torch.equal(found, states[3:])
        assert found.data_ptr() == states[3:].data_ptr()
    found = packed(seen, spans, [slice(0, 1), slice(2, 4), slice(5, 11)])
    for one, states in zip(found, seen[:2], strict=True):
        assert torch.equal(one, torch.cat((states[3:4], states[6:8], states[14:20])))


def test_spans_with_rows_between_them_are_left_to_the_plain_path() -> None:
    spans = [Span(0, 4, 0, 4, 0), Span(5, 4, 0, 4, 5)]
    assert pack(SPEC, spans) is None
    assert pack(SPEC, [spans[1]]) is None


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9))))
def test_numbers_of_runs(runs: list[tuple[int, int]]) -> None:
    found = numbers_of([slice(start, start + length) for start, length in runs])
    assert found.tolist() == [number for start, length in runs for number in range(start, start + length)]
    assert found.dtype == torch.int64


def test_a_cpu_keeps_its_own_path() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert not serves(SPEC, torch.empty(HEADS, 3, SIZE, dtype=dtype))


@contextmanager
def served() -> Iterator[Calls]:
    """Sends every slice of the CPU, in float32, the way that CUDA goes in 16 bits, as far as there is one call."""
    with pytest.MonkeyPatch.context() as patch, reference() as calls:
        patch.setattr(attention, "serves", lambda spec, states: in_one_call(spec))
        yield calls


def in_one_call(spec: LayerSpec) -> bool:
    return spec.softcap is None and spec.relative is None


@pytest.mark.parametrize("slice_tokens", [None, 40])
def test_whole_models_give_the_same_scores(tiny: Path, slice_tokens: int | None) -> None:
    """Every family, with shared prefixes, windows, sequences that do not fit into a slice, and single queries."""
    query = "w1 w2 w3 w4 w5 w6 w7 w8 w9"
    pairs = [(query, " ".join(f"w{(i * length) % 150}" for i in range(length))) for length in (1, 7, 60, 30)]
    reranker = load(tiny, slice_tokens=slice_tokens)
    layers = reranker.scorer.model.spec.layers
    with served() as calls:
        found = reranker.score(pairs)
    if slice_tokens is None:  # one call for all sequences of a layer
        assert len(calls) == sum(map(in_one_call, layers))
    assert found == pytest.approx(load(tiny).score(pairs), abs=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 8])
def test_torch_computes_what_the_reference_says(dtype: torch.dtype, causal: bool, window: int | None) -> None:
    """On a GPU: the packed call against the plain path in float32."""
    spec = replace(SPEC, key_heads=2, causal=causal, window=window)
    states = [random_states(73, heads).to("cuda", dtype) for heads in (HEADS, 2, 2)]
    spans = [Span(0, 1, 0, 1, 0), Span(1, 40, 0, 40, 1), Span(41, 29, 0, 29, 41)]
    seen = Seen(*states[1:])
    if not serves(spec, states[0]):
        pytest.skip("this GPU has no such kernels")
    output = ragged_attention(spec, states[0], seen, spans)
    wide = Seen(*(one.float() for one in states[1:]))
    torch.testing.assert_close(
        output[:70].float(), plain(spec, states[0].float(), wide, spans), atol=0.02, rtol=0.02
    )
    assert not output[70:].any()
