"""What a lens looks at: the same however requests are packed, sliced and shared."""

import random
from collections.abc import Collection, Sequence
from itertools import accumulate, pairwise, product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cosine_similarity

from grating_core import Prompt, Reranker
from grating_core.engine.ragged import Part, Piece, RaggedBatch
from grating_core.lens import features
from grating_core.lens.features import Features, LayerMap, Lens, compares_tokens, feature_count
from grating_core.lens.observations import Observer
from grating_core.lens.pruning import Pruning
from grating_core.pruning import Off
from grating_core.requests import Request
from grating_core.results import Trace
from grating_core.text.pairs import Segments
from tests.core.conftest import FAMILIES, WORDS, save_model
from tests.core.parity import load, random_text

QUERY = "w1 w2 w3"
SOURCE = random.Random(3)
DOCUMENTS = [random_text(length, SOURCE, WORDS) for length in (4, 30, 1, 12, 60, 0, 7)]
DEPTH = 5
BEFORE = Prompt(pieces=("w9 w8 w7 w6 {query} w5 w4", "w3 {document} w2 w1"))
BEHIND = Prompt(pieces=("w9 w8", "w3 {document} w2 w1", "w7 {query} w6"))


# A document without tokens has nothing to say.
PIECES = [Piece(0, 0, 9, 0, Segments((1, 3), (4, 8))), Piece(0, 1, 5, 0, Segments((1, 3), (4, 4)))]


def sliced(pieces: Sequence[Piece], cuts: Collection[int]) -> list[tuple[slice, list[Part]]]:
    """Cut the token axis at some places: where each slice is, and what it has of each piece."""
    found: list[tuple[slice, list[Part]]] = []
    ends = list(accumulate(piece.length for piece in pieces))
    for first, last in pairwise(sorted({0, ends[-1], *cuts})):
        parts = []
        for piece, end in zip(pieces, ends, strict=True):
            start = end - piece.length
            if max(first, start) < min(last, end):
                rows = slice(max(first, start) - first, min(last, end) - first)
                parts.append(Part(piece, rows, max(first, start) - start))
        found.append((slice(first, last), parts))
    return found


@pytest.fixture(params=[False, True], ids=["apart", "together"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """The way of a CPU, and that of a GPU on the CPU."""
    monkeypatch.setattr(features, "is_together", lambda device: request.param)
    return bool(request.param)


def seen(
    states: Tensor, pieces: Sequence[Piece], pooling: str, cuts: Collection[int] = (), number: int = 0
) -> Tensor:
    """The features after a layer, of states that are overwritten as soon as they have been seen."""
    reader = Features(number, DEPTH, pooling)
    found = []
    for tokens, parts in sliced(pieces, cuts):
        part = torch.cat((states[tokens], torch.full((3, states.shape[1]), torch.nan)))  # with fill behind
        found.append(reader.see(part, parts))
        part.fill_(torch.nan)
    return torch.cat(found)


def expected_features(own: Tensor, query: Tensor, document: Tensor, pooling: str) -> Tensor:
    """The features of one sequence in the first layers, in float64."""
    own, query, document = own.double(), query.double(), document.double()
    expected = [own.mean(0) if pooling == "mean" else own[-1 if pooling == "last" else 0]]
    expected += [text.sum(0) / max(1, len(text)) for text in (query, document)]
    expected.append(expected[1] * expected[2])
    if not len(query) or not len(document):
        return torch.cat([*expected, expected[0].new_zeros(own.shape[1] + 5)])
    cosines = torch.stack([cosine_similarity(token, document) for token in query])
    best = cosines.max(1)
    expected.append((query * document[best.indices]).mean(0))
    similarities = [best.values.mean(), best.values.min(), cosines.mean(), cosines.max(0).values.mean()]
    return torch.cat([*expected, torch.stack([*similarities, torch.tensor(len(document)).double().log()])])


def random_lens(width: int, pooling: str) -> Lens:
    chance = torch.Generator().manual_seed(0)
    counts = [feature_count(width, compares_tokens(number, DEPTH)) for number in range(DEPTH)]
    return Lens([LayerMap(torch.randn(count, generator=chance), torch.tensor(0.5)) for count in counts], pooling)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("pooling", ["first", "last", "mean"])
def test_features_by_hand(pooling: str) -> None:
    states = torch.randn(14, 6)
    found = seen(states, PIECES, pooling)
    assert found.shape == (2, feature_count(6, True))
    expected = expected_features(states[:9], states[1:3], states[4:8], pooling).float()
    torch.testing.assert_close(found[0], expected)
    assert found[1, 12:].tolist() == [0.0] * (len(found[1]) - 12)
    after = seen(states, PIECES, pooling, number=4)
    assert after.shape == (2, feature_count(6, False))
    torch.testing.assert_close(after, found[:, : after.shape[1]])


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[Piece], set[int]]:
    """The pieces of a request, and where they are cut. Texts may be empty, and begin in the shared prefix."""
    prefix = draw(st.one_of(st.integers(0, 12), st.sampled_from([300, 1300])))
    pieces = [Piece(0, None, prefix)] if prefix else []
    for number in range(draw(st.integers(1, 4))):
        length = draw(st.one_of(st.integers(1, 30), st.sampled_from([513, 1200])))
        edges = sorted(draw(st.lists(st.integers(0, prefix + length), min_size=4, max_size=4)))
        texts = draw(st.permutations([(edges[0], edges[1]), (edges[2], edges[3])]))
        pieces.append(Piece(0, number, length, prefix, Segments(*texts)))
    tokens = sum(piece.length for piece in pieces)
    return pieces, draw(st.sets(st.integers(1, tokens), max_size=8))


@settings(max_examples=60)
@given(requests(), st.sampled_from(["first", "last", "mean"]), st.integers(0, 2**31))
def test_features_do_not_depend_on_where_a_request_is_cut(
    request: tuple[list[Piece], set[int]], pooling: str, seed: int
) -> None:
    pieces, cuts = request
    states = torch.randn(sum(piece.length for piece in pieces), 8, generator=torch.Generator().manual_seed(seed))
    prefix = states[: pieces[-1].before]
    expected, end = [], 0
    for piece in pieces:
        start, end = end, end + piece.length
        if piece.segments is not None:
            own = states[start:end]
            texts = [
                torch.cat((prefix, own))[slice(*span)] for span in (piece.segments.query, piece.segments.document)
            ]
            expected.append(expected_features(own, *texts, pooling))
    for together, some in product((False, True), ((), cuts)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(features, "is_together", lambda device, together=together: together)
            first = seen(states, pieces, pooling, some).double()
            layers = seen(states, pieces, pooling, some, number=4).double()
        torch.testing.assert_close(first, torch.stack(expected), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layers, torch.stack(expected)[:, : layers.shape[1]], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("way")
def test_a_broken_sequence_leaves_the_features_of_others_alone() -> None:
    pieces = [*PIECES, Piece(0, 2, 12, 0, Segments((1, 3), (4, 11)))]
    states = torch.randn(26, 6, generator=torch.Generator().manual_seed(4))
    sound = seen(states, pieces, "mean")
    for broken, value in enumerate((torch.nan, torch.inf, torch.nan)):
        damaged = states.clone()
        start = sum(piece.length for piece in pieces[:broken])
        damaged[start : start + pieces[broken].length] = value
        found = seen(damaged, pieces, "mean")
        for number in range(3):
            assert torch.equal(found[number], sound[number]) == (number != broken)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("pooling", ["first", "last", "mean"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cuts", [(), (2, 6)])
def test_features_of_large_states_are_computed_in_float32(
    pooling: str, dtype: torch.dtype, cuts: Collection[int]
) -> None:
    """Products of states above 256 are infinite in float16."""
    states = (3000 * torch.randn(14, 6, generator=torch.Generator().manual_seed(2))).to(dtype)
    found = seen(states, PIECES, pooling, cuts)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    torch.testing.assert_close(found, seen(states.float(), PIECES, pooling))


def trace_of(reranker: Reranker, documents: list[str], pruning: Pruning) -> Trace:
    job = reranker.scorer.job(Request(QUERY, documents, 1), pruning)
    reranker.scorer.run([job])
    return job.future.result().trace


def read_layers(reranker: Reranker, documents: list[str]) -> np.ndarray:
    """The estimates of all layers but the last, ``[L, N]``."""
    scorer = reranker.scorer
    lens = random_lens(scorer.model.width, scorer.model.spec.pooling)
    trace = trace_of(reranker, documents, Pruning(Off(), lens))
    return np.array([layer.scores for layer in trace.layers[:-1]])


@pytest.mark.parametrize("family", FAMILIES)
def test_estimates_do_not_depend_on_slices_and_company(family: str, tmp_path: Path) -> None:
    directory = save_model(tmp_path, family)
    expected = read_layers(load(directory), DOCUMENTS)
    assert expected.shape == (DEPTH, len(DOCUMENTS))
    for slice_tokens in (1, 40):
        found = read_layers(load(directory, slice_tokens=slice_tokens), DOCUMENTS)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)
    found = read_layers(load(directory), DOCUMENTS[::-2])
    np.testing.assert_allclose(found, expected[:, ::-2], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_estimates_do_not_depend_on_the_shared_prefix(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = save_model(tmp_path, family)
    reranker = load(directory, template=BEFORE)
    shared = read_layers(reranker, DOCUMENTS)
    pack = RaggedBatch.pack
    prefixes = []

    def pack_apart(requests: object, *, share_prefix: bool, mixed: bool) -> RaggedBatch:
        prefixes.append(pack(requests, share_prefix=share_prefix).pieces[-1].before)
        return pack(requests, share_prefix=False)

    monkeypatch.setattr(RaggedBatch, "pack", pack_apart)
    np.testing.assert_allclose(shared, read_layers(reranker, DOCUMENTS), rtol=1e-4, atol=1e-3)
    assert min(prefixes) >= 8


def test_an_observer_sees_what_a_lens_would_see(tmp_path: Path) -> None:
    reranker = load(save_model(tmp_path, "llama"), template=BEFORE, slice_tokens=40)
    scorer = reranker.scorer
    observer = Observer(DEPTH, scorer.model.spec.pooling)
    scores, tokens = scorer.observe(Request(QUERY, DOCUMENTS), observer)
    assert scores == pytest.approx(reranker.score([(QUERY, document) for document in DOCUMENTS]), abs=1e-4)
    lens = random_lens(scorer.model.width, scorer.model.spec.pooling)
    found = [
        torch.cat(parts) @ layer.weight + layer.bias
        for parts, layer in zip(observer.features, lens.maps, strict=True)
    ]
    np.testing.assert_allclose(torch.stack(found), read_layers(reranker, DOCUMENTS), rtol=1e-4, atol=1e-3)
    trace = trace_of(reranker, DOCUMENTS, Pruning(Off()))
    assert trace.shared_prefix
    assert [own + trace.shared_prefix for own in tokens] == list(trace.lengths)


def test_segments_are_the_tokens_of_the_two_texts(tmp_path: Path) -> None:
    for number, (family, prompt) in enumerate(
        [("bert", None), ("roberta", None), ("llama", None), ("llama", BEFORE), ("llama", BEHIND)]
    ):
        reranker = load(directory := save_model(tmp_path / str(number), family), template=prompt)
        backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
        for (pair,), document in zip(reranker.scorer.template.encode(QUERY, DOCUMENTS), DOCUMENTS, strict=True):
            for span, text in ((pair.segments.query, QUERY), (pair.segments.document, document)):
                words = [backend.id_to_token(token) for token in pair.input_ids[slice(*span)]]
                assert words == text.split()


def test_streamed_and_spilled_estimates_are_the_same(tiny_bert: Path, spill_directory: Path) -> None:
    expected = read_layers(load(tiny_bert), DOCUMENTS * 4)
    reranker = load(tiny_bert, memory_budget="300MB")
    assert np.abs(read_layers(reranker, DOCUMENTS * 4) - expected).max() < 1e-3
