"""Classifiers that transformers computes: scores, requests, refusals."""

import json
import os
import pickle
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoModelForSequenceClassification,
    CamembertConfig,
    CamembertForSequenceClassification,
    ConvBertConfig,
    ConvBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    MPNetConfig,
    MPNetForSequenceClassification,
    PreTrainedModel,
)

from grating_core import ClusterPolicy, ModelNotFoundError, Request, Reranker, UnsupportedModelError
from grating_core.engine.watch import Watch
from grating_core.errors import ScoreError
from grating_core.models.by_transformers import Classifier
from tests.core.conftest import BUNDLED, SIZES, WINDOW, WORDS, randomise, save_model, save_tokenizer
from tests.core.forking import in_fork
from tests.core.parity import TOLERANCE, random_text, saved_tokenizer

LENGTHS = [1, 0, 5, 17, 2, 90, 40, 300, 33, 1]
TYPES = {"albert", "convbert"}

MODELS: dict[str, Callable[..., PreTrainedModel]] = {
    "albert": lambda **sizes: AlbertForSequenceClassification(
        AlbertConfig(**SIZES | sizes, embedding_size=16, max_position_embeddings=WINDOW)
    ),
    "camembert": lambda **sizes: CamembertForSequenceClassification(
        CamembertConfig(**SIZES | sizes, max_position_embeddings=WINDOW + 2, type_vocab_size=1)
    ),
    "mpnet": lambda **sizes: MPNetForSequenceClassification(
        MPNetConfig(**SIZES | sizes, max_position_embeddings=WINDOW + 2)
    ),
    # A convolution sees the padding, and the last has no token to pad with.
    "convbert": lambda **sizes: ConvBertForSequenceClassification(
        ConvBertConfig(**SIZES | sizes, embedding_size=16, max_position_embeddings=WINDOW, head_ratio=2)
    ),
    "gpt2": lambda **sizes: GPT2ForSequenceClassification(
        GPT2Config(vocab_size=210, n_embd=32, n_layer=3, n_head=4, n_positions=WINDOW, **{"num_labels": 1} | sizes)
    ),
}


def saved(directory: Path, name: str, **sizes: object) -> Path:
    torch.manual_seed(0)
    randomise(MODELS[name](**sizes)).save_pretrained(directory)
    save_tokenizer(directory, types=name in TYPES)
    return directory


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def albert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("albert"), "albert")


@torch.inference_mode()
def single_scores(directory: Path, pairs: list[tuple[str, str]]) -> list[float]:
    """transformers' scores of one pair at a time, without padding."""
    tokenizer = saved_tokenizer(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    return [
        model(
            **tokenizer([pair[0]], [pair[1]], truncation="only_second", max_length=WINDOW, return_tensors="pt")
        ).logits[0, 0].item()
        for pair in pairs
    ]  # fmt: skip


def test_scores_equal_transformers_single_pairs(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)  # shown when the test fails
    source = random.Random(seed)
    query = random_text(3, source, WORDS)
    documents = [random_text(length, source, WORDS) for length in LENGTHS]
    expected = single_scores(model, [(query, document) for document in documents])
    assert max(expected) - min(expected) > 100 * TOLERANCE
    with Reranker.from_pretrained(model, device="cpu") as reranker:
        assert (reranker.dtype, reranker.max_length) == (torch.float32, WINDOW)
        assert reranker.scorer.pads == (model.name.rstrip("0") not in ("convbert", "gpt2"))
        result = reranker.rerank(query, documents, top_k=4)
        assert result.trace.kernels == "transformers"
        assert result.trace.compute_share == 1.0
        assert 7 in result.trace.truncated
        best = sorted(range(len(documents)), key=lambda i: -expected[i])[:4]
        assert [ranked.index for ranked in result.ranking] == best
        assert result.trace.layers[-1].scores == pytest.approx(expected, abs=TOLERANCE)
        # Neighbours and requests beside it change nothing but rounding.
        reranker.scorer.slice_tokens = 200
        alone = [Request(query, [document]) for document in documents]
        found = [result.ranking[0].score for result in reranker.rerank_many(alone)]
        assert found == pytest.approx(expected, abs=TOLERANCE)
        assert reranker.score([(query, document) for document in documents]) == pytest.approx(found, abs=TOLERANCE)
    (said,) = (record.message for record in caplog.records if "slower" in record.message)
    assert "no memory budget" in said


def test_the_bundled_model_has_the_scores_of_gratings_own_layers(bundled: Reranker) -> None:
    source = random.Random(4)
    vocabulary = ["Berlin", "museum", "people", "東京", "🎉", "3,520,031", "and", "[SEP]"]
    pairs = [("How many people?", random_text(length, source, vocabulary)) for length in (0, 1, 30, 700)]
    with Reranker.from_pretrained(BUNDLED, engine="transformers", device="cpu") as reranker:
        assert reranker.score(pairs) == pytest.approx(bundled.score(pairs), abs=TOLERANCE)
        assert reranker.scorer.pads


def test_long_documents_may_be_windows(albert: Path) -> None:
    document = random_text(300, random.Random(5), WORDS)
    with Reranker.from_pretrained(albert, device="cpu", long_documents="windows") as reranker:
        result = reranker.rerank("w1 w2", ["w3", document])
        assert result.trace.windows[1] > 3
        assert not result.trace.truncated


def test_a_batch_has_a_bounded_number_of_tokens(albert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    with Reranker.from_pretrained(albert, device="cpu") as reranker:
        reranker.scorer.slice_tokens = 100
        score = reranker.scorer.model.score

        def watched(sequences: list[list[int]], types: list[list[int]]) -> torch.Tensor:
            seen.append([len(ids) for ids in sequences])
            return score(sequences, types)

        monkeypatch.setattr(reranker.scorer.model, "score", watched)
        reranker.rerank(
            "w1", [random_text(length, random.Random(6), WORDS) for length in (2, 90, 3, 40, 44, 2, 1)]
        )
    assert seen == [[94], [48, 44], [7, 6, 6, 5]]


async def test_a_deadline_ends_with_the_callers_order(albert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Reranker.from_pretrained(albert, device="cpu") as reranker:
        expected = reranker.rerank("w1", ["w2", "w3 w4"]).ranking
        assert reranker.rerank("w1", ["w2", "w3 w4"], deadline=60).ranking == expected
        score = reranker.scorer.model.score
        monkeypatch.setattr(reranker.scorer.model, "score", lambda *of: (time.sleep(0.05), score(*of))[1])
        reranker.scorer.slice_tokens = 1
        result = reranker.rerank("w1", ["w2"] * 99, 2, deadline=0.2)
        assert result.trace.cut_short
        assert [ranked.index for ranked in result.ranking] == [0, 1]
        assert result.trace.seconds < 1
        awaited = await reranker.arerank("w1", ["w2"] * 99, 2, deadline=0.2)
        assert awaited.trace.cut_short


async def test_it_can_be_awaited_shared_pickled_forked_and_closed(albert: Path) -> None:
    reranker = Reranker.from_pretrained(albert, device="cpu")
    documents = ["w1 w2", "w3", "w1 w1 w9"]
    expected = [
        (one.index, pytest.approx(one.score, abs=1e-6)) for one in reranker.rerank("w1", documents).ranking
    ]

    def found(reranker: Reranker = reranker) -> list[tuple[int, float]]:
        return [(one.index, one.score) for one in reranker.rerank("w1", documents).ranking]

    assert [(one.index, one.score) for one in (await reranker.arerank("w1", documents)).ranking] == expected
    answers: list[object] = []
    threads = [threading.Thread(target=lambda: answers.append(found())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [expected] * 4
    if hasattr(os, "fork"):
        assert in_fork(found) == expected
    with pickle.loads(pickle.dumps(reranker)) as other:
        assert found(other) == expected
    assert reranker.rerank("w1", []).ranking == []
    reranker.close()
    with pytest.raises(RuntimeError, match="closed"):
        found()


@pytest.mark.parametrize(
    "setting",
    [{"memory_budget": "1GB"}, {"dtype": "int8"}, {"adapter": "adapter"}, {"lens": "lens"},
     {"pruning": "cluster"}, {"pruning": ClusterPolicy()}, {"recalibrate": 0.5}],
)  # fmt: skip
@pytest.mark.parametrize("engine", ["auto", "transformers"])
def test_settings_of_gratings_own_layers_are_refused_by_name(
    albert: Path, tmp_path: Path, engine: str, setting: dict[str, object]
) -> None:
    if "adapter" in setting:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
        parts = {"x.lora_A.weight": torch.ones(1, 2), "x.lora_B.weight": torch.ones(2, 1)}
        named = {f"base_model.model.{name}": part for name, part in parts.items()}
        save_file(named, tmp_path / "adapter_model.safetensors")
        setting = {"adapter": tmp_path}
    with pytest.raises(ValueError, match=f"^{next(iter(setting))}=.*transformers computes AlbertFor.*leave"):
        Reranker.from_pretrained(albert, device="cpu", engine=engine, **setting)


def test_what_needs_states_between_layers_is_refused(albert: Path) -> None:
    with Reranker.from_pretrained(albert, device="cpu") as reranker:
        with pytest.raises(ValueError, match=r"^scores='estimated'"):
            reranker.rerank("w1", ["w2"], scores="estimated")
        for wrong in ({"pruning": ClusterPolicy()}, {"target": 0.9}):
            with pytest.raises(ValueError, match=f"^{next(iter(wrong))}="):
                reranker.rerank_many([Request("w1", ["w2"], **wrong)])
        with pytest.raises(ValueError, match=r"^calibrate "):
            reranker.calibrate(["w1"] * 30)


def test_engine_grating_refuses_what_its_layers_do_not_know(albert: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="AlbertForSequenceClassification"):
        Reranker.from_pretrained(albert, engine="grating")
    with pytest.raises(ValueError, match=r"^engine='vllm' must be"):
        Reranker.from_pretrained(albert, engine="vllm")


def test_a_score_that_is_no_number_is_refused_alone(albert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Reranker.from_pretrained(albert, device="cpu") as reranker:
        score = reranker.scorer.model.score

        def broken(ids: list[list[int]], types: list[list[int]]) -> torch.Tensor:
            return score(ids, types).masked_fill(torch.tensor([len(one) > 10 for one in ids]), torch.nan)

        monkeypatch.setattr(reranker.scorer.model, "score", broken)
        long = "w1 " * 20
        with pytest.raises(ScoreError, match="document 1 "):
            reranker.rerank("w1", ["w2", long])
        assert len(reranker.rerank("w1", ["w2", "w3"]).ranking) == 2


def change(directory: Path, **fields: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_two_labels_score_by_the_relevant_one(tmp_path: Path) -> None:
    named = {"id2label": {0: "relevant", 1: "irrelevant"}, "label2id": {"relevant": 0, "irrelevant": 1}}
    directory = saved(tmp_path, "albert", num_labels=2)
    change(directory, **named)
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    batch = saved_tokenizer(directory)("w1 w2", "w3 w4 w5", return_tensors="pt")
    with torch.inference_mode():
        logits = model(**batch).logits[0]
    with Reranker.from_pretrained(directory, device="cpu") as reranker:
        result = reranker.rerank("w1 w2", ["w3 w4 w5"])
    assert result.ranking[0].score == pytest.approx((logits[0] - logits[1]).item(), abs=TOLERANCE)
    assert "less that of 'irrelevant'" in result.trace.notes[0]


@pytest.mark.parametrize("engine", ["auto", "transformers"])
def test_what_is_no_classifier_of_transformers_is_refused(tmp_path: Path, engine: str) -> None:
    directory = saved(tmp_path, "albert")
    # Jina's first rerankers call themselves "bert", and are computed by code of their own.
    code = {"AutoModelForSequenceClassification": "modeling_bert.JinaBertForSequenceClassification"}
    change(directory, architectures=["JinaBertForSequenceClassification"], model_type="bert", auto_map=code)
    with pytest.raises(UnsupportedModelError, match="JinaBert.*" + "never runs" * (engine != "auto")):
        Reranker.from_pretrained(directory, engine=engine)
    change(directory, architectures=["T5ForConditionalGeneration"], model_type="t5", auto_map=None)
    with pytest.raises(UnsupportedModelError, match="T5ForConditionalGeneration"):
        Reranker.from_pretrained(directory, engine=engine)
    with pytest.raises(UnsupportedModelError, match="3 labels"):
        Reranker.from_pretrained(saved(tmp_path / "3", "albert", num_labels=3), engine=engine)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    directory = saved(tmp_path, "albert")
    torch.manual_seed(1)
    MODELS["albert"]().albert.save_pretrained(directory)  # without the head
    change(directory, architectures=["AlbertForSequenceClassification"])
    with pytest.raises(ModelNotFoundError, match="lack classifier"):
        Reranker.from_pretrained(directory)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ModelNotFoundError, match=r"pytorch_model.bin"):
        Reranker.from_pretrained(directory)


def test_a_decoder_and_a_gguf_file_are_refused_by_engine_transformers(tmp_path: Path) -> None:
    directory = save_model(tmp_path, "llama")
    change(directory, architectures=["LlamaForCausalLM"])
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM.*ForSequenceClassification"):
        Reranker.from_pretrained(directory, engine="transformers")
    file = tmp_path / "model.gguf"
    file.touch()
    with pytest.raises(UnsupportedModelError, match="GGUF file, which takes engine='grating'"):
        Reranker.from_pretrained(file, engine="transformers")


def test_a_deadline_ends_between_batches_with_the_first_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time is the number of tokens that were computed."""
    source = random.Random(3)
    documents = [random_text(20, source, WORDS) for _ in range(8)]
    with Reranker.from_pretrained(saved(tmp_path, "albert"), device="cpu") as reranker:
        scorer = reranker.scorer
        scorer.slice_tokens = 48
        free = reranker.rerank("w1", documents, 8)
        tokens, score = 0, Classifier.score

        def counted(model: Classifier, ids: list[list[int]], types: list[list[int]]) -> torch.Tensor:
            nonlocal tokens
            tokens += sum(map(len, ids))
            return score(model, ids, types)

        monkeypatch.setattr(Classifier, "score", counted)
        scorer.watch = Watch(1, lambda: tokens)
        assert reranker.rerank("w1", documents, 8, deadline=10_000).ranking == free.ranking
        exact = {ranked.index: ranked.score for ranked in free.ranking}
        for share in (0.3, 0.6):
            began = tokens
            result = reranker.rerank("w1", documents, 8, deadline=share * sum(free.trace.lengths))
            assert tokens - began <= share * sum(free.trace.lengths) + scorer.slice_tokens
            assert result.trace.cut_short
            done = [ranked.index for ranked in result.ranking if not ranked.estimated]
            assert sorted(done) == list(range(len(done)))
            assert len(done) in (2, 3, 4, 5)
            assert [ranked.index for ranked in result.ranking[len(done) :]] == list(range(len(done), 8))
            for ranked in result.ranking[: len(done)]:
                assert ranked.score == pytest.approx(exact[ranked.index], abs=1e-4)
