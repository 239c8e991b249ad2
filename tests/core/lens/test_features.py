"""What a lens looks at: the same however requests are packed, chunked and shared."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch.nn.functional import cosine_similarity

from grating_core import Prompt, Reranker
from grating_core.engine.ragged import RaggedBatch
from grating_core.lens.features import Features, LayerMap, Lens, compares_tokens, feature_count
from grating_core.lens.pruning import Pruning
from grating_core.pruning import Off
from grating_core.text.pairs import Segments
from tests.core.conftest import FAMILIES, WORDS, save_model
from tests.core.parity import load, random_text

QUERY = "w1 w2 w3"
SOURCE = random.Random(3)
DOCUMENTS = [random_text(length, SOURCE, WORDS) for length in (4, 30, 1, 12, 60, 0, 7)]
DEPTH = 5
BEFORE = Prompt(pieces=("w9 w8 w7 w6 {query} w5 w4", "w3 {document} w2 w1"))
BEHIND = Prompt(pieces=("w9 w8", "w3 {document} w2 w1", "w7 {query} w6"))


class Sequences:
    prefix = 0
    lengths = (9, 5)
    segments = (Segments((1, 3), (4, 8)), Segments((1, 3), (4, 4)))


def random_lens(width: int, pooling: str) -> Lens:
    chance = torch.Generator().manual_seed(0)
    counts = [feature_count(width, compares_tokens(number, DEPTH)) for number in range(DEPTH)]
    return Lens([LayerMap(torch.randn(count, generator=chance), torch.tensor(0.5)) for count in counts], pooling)


@pytest.mark.parametrize(("pooling", "place"), [("first", 0), ("last", 8), ("mean", None)])
def test_features_by_hand(pooling: str, place: int | None) -> None:
    hidden = torch.randn(1, 20, 6)
    found = Features(0, DEPTH, 0, pooling)(hidden, Sequences())
    assert found.shape == (2, feature_count(6, True))
    states = hidden[0, :9]
    query, document = states[1:3], states[4:8]
    expected = [states.mean(0) if place is None else states[place], query.mean(0), document.mean(0)]
    expected.append(expected[1] * expected[2])
    cosines = torch.stack([cosine_similarity(token, document) for token in query])
    best = cosines.max(1)
    expected.append((query * document[best.indices]).mean(0))
    similarities = [best.values.mean(), best.values.min(), cosines.mean(), cosines.max(0).values.mean()]
    expected.append(torch.stack([*similarities, torch.tensor(4.0).log()]))
    torch.testing.assert_close(found[0], torch.cat(expected))
    # A document without tokens has nothing to say.
    assert found[1, 12:].tolist() == [0.0] * (len(found[1]) - 12)
    assert Features(4, DEPTH, 0, pooling)(hidden, Sequences()).shape == (2, feature_count(6, False))


@pytest.mark.parametrize("pooling", ["first", "last", "mean"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_features_of_large_states_are_computed_in_float32(pooling: str, dtype: torch.dtype) -> None:
    """Products of states above 256 are infinite in float16."""
    hidden = (3000 * torch.randn(1, 20, 6, generator=torch.Generator().manual_seed(2))).to(dtype)
    found = Features(0, DEPTH, 0, pooling)(hidden, Sequences())
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    torch.testing.assert_close(found, Features(0, DEPTH, 0, pooling)(hidden.float(), Sequences()))


def read_layers(reranker: Reranker, documents: list[str]) -> np.ndarray:
    """The estimates of all layers but the last, ``[L, N]``."""
    scorer = reranker.scorer
    lens = random_lens(scorer.model.width, scorer.model.pooling)
    trace = scorer.rank(QUERY, documents, 1, Pruning(Off(), lens)).trace
    return np.array([layer.scores for layer in trace.layers[:-1]])


@pytest.mark.parametrize("family", FAMILIES)
def test_estimates_do_not_depend_on_chunks_and_company(family: str, tmp_path: Path) -> None:
    directory = save_model(tmp_path, family)
    expected = read_layers(load(directory), DOCUMENTS)
    assert expected.shape == (DEPTH, len(DOCUMENTS))
    for chunk_tokens in (1, 40):
        found = read_layers(load(directory, chunk_tokens=chunk_tokens), DOCUMENTS)
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

    def pack_apart(candidates: object, device: object, *, share_prefix: bool) -> RaggedBatch:
        prefixes.append(pack(candidates, device, share_prefix=share_prefix).prefix)
        return pack(candidates, device, share_prefix=False)

    monkeypatch.setattr(RaggedBatch, "pack", pack_apart)
    np.testing.assert_allclose(shared, read_layers(reranker, DOCUMENTS), rtol=1e-4, atol=1e-3)
    assert min(prefixes) >= 8


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
