"""Listwise reranking with jina-reranker-v3's layout, against the recipe of the code that comes with the model."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from grating_core import BudgetError, Request, Reranker, UnsupportedModelError
from tests.core.conftest import DECODER, SIZES, randomise
from tests.core.parity import TOLERANCE, load, random_text
from tests.core.text.test_prompts import save_qwen3_reranker

DOCUMENT, QUERY = "<|embed_token|>", "<|rerank_token|>"
WORDS = ["Berlin", "has", "3.7", "million.", "yes\n", "?", "e", "(no)", "<|im_end|", "東京"]
LENGTHS = [1, 0, 5, 17, 2, 60, 33, 1]


def save_listwise(directory: Path, seed: int = 3) -> Path:
    """A tiny random model in the official layout, with the window of its tokenizer."""
    made = save_qwen3_reranker(directory.parent / "tokenizer of" / directory.name)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(made, model_max_length=8192)
    tokenizer.add_special_tokens({"additional_special_tokens": [DOCUMENT, QUERY]}, False)
    tokenizer.save_pretrained(directory)
    torch.manual_seed(seed)
    sizes = SIZES | DECODER | {"vocab_size": len(tokenizer), "max_position_embeddings": 8192}
    config = Qwen3Config(**sizes, tie_word_embeddings=True)
    config.save_pretrained(directory)
    path = directory / "config.json"
    named = {"AutoModel": "modeling.JinaForRanking"}
    stated = {"architectures": ["JinaForRanking"], "auto_map": named}
    path.write_text(json.dumps(json.loads(path.read_text()) | stated))
    weights = {f"model.{name}": weight for name, weight in randomise(Qwen3Model(config)).state_dict().items()}
    weights |= {"projector.0.weight": torch.randn(16, 32), "projector.2.weight": torch.randn(512, 16)}
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


def prompt(query: str, documents: list[str], instruction: str | None) -> str:
    told = (
        "You are a search relevance expert who can determine a ranking of the passages based on how relevant they "
        "are to the query. If the query is a question, how relevant a passage is depends on how well it answers "
        "the question. If not, try to analyze the intent of the query and assess how well each passage satisfies "
        "the intent. If an instruction is provided, you should follow the instruction when determining the "
        "ranking."
    )
    passages = "".join(
        f'<passage id="{number}">\n{document}{DOCUMENT}\n</passage>\n' for number, document in enumerate(documents)
    )
    instructed = f"<instruct>\n{instruction}\n</instruct>\n" if instruction else ""
    return (
        f"<|im_start|>system\n{told}<|im_end|>\n<|im_start|>user\nI will provide you with {len(documents)} "
        f"passages, each indicated by a numerical identifier. Rank the passages based on their relevance to "
        f"query: {query}\n{instructed}{passages}<query>\n{query}{QUERY}\n</query><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


@torch.inference_mode()
def recipe(directory: Path, query: str, blocks: list[list[str]], instruction: str | None = None) -> list[float]:
    """The scores of documents in blocks."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    stored = load_file(directory / "model.safetensors")
    model = Qwen3Model(Qwen3Config.from_pretrained(directory)).eval()
    model.load_state_dict({name.removeprefix("model."): stored[name] for name in stored if name[:6] == "model."})
    documents, queries, weights = [], [], []
    for block in blocks:
        ids = tokenizer(prompt(query, block, instruction), return_tensors="pt")["input_ids"]
        states = model(ids).last_hidden_state[0]
        embeddings = [
            functional.relu(states[ids[0] == token] @ stored["projector.0.weight"].T)
            @ stored["projector.2.weight"].T
            for token in tokenizer.convert_tokens_to_ids([DOCUMENT, QUERY])
        ]
        assert [len(found) for found in embeddings] == [len(block), 1]
        weights.append(float((1 + functional.cosine_similarity(*embeddings)).max() / 2))
        documents.append(embeddings[0])
        queries.append(embeddings[1][0].numpy())
    merged = torch.tensor(np.average(queries, axis=0, weights=weights))
    return functional.cosine_similarity(torch.cat(documents), merged[None]).tolist()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_listwise(tmp_path_factory.mktemp("models") / "jina-reranker-v3")


@pytest.fixture
def documents() -> list[str]:
    seed = random.randrange(10**6)
    print("seed", seed)  # shown when the test fails
    source = random.Random(seed)
    return [random_text(length, source, WORDS) for length in LENGTHS]


@pytest.mark.parametrize("instruction", [None, "Find cities.\n"])
def test_scores_are_those_of_the_recipe(directory: Path, documents: list[str], instruction: str | None) -> None:
    query = "How many people? "
    expected = recipe(directory, query, [documents], instruction)
    assert max(expected) - min(expected) > 100 * TOLERANCE
    with load(directory, instruction=instruction, pruning="auto") as reranker:
        assert (reranker.max_length, reranker.lens) == (8192, None)
        result = reranker.rerank(query, documents, top_k=3)
        assert result.trace.layers[-1].scores == pytest.approx(expected, abs=TOLERANCE)
        best = sorted(range(len(documents)), key=lambda i: -expected[i])[:3]
        assert [ranked.index for ranked in result.ranking] == best
        assert [ranked.probability for ranked in result.ranking] == pytest.approx(
            [(1 + expected[index]) / 2 for index in best], abs=TOLERANCE
        )
        assert result.trace.compute_share == 1.0
        assert "reads all documents" in result.trace.notes[-1]
        reranker.scorer.slice_tokens = 64  # sequences are divided
        again = reranker.rerank_many([Request(query, documents), Request("other", documents[:2])])
        assert again[0].trace.layers[-1].scores == pytest.approx(expected, abs=TOLERANCE)
        other = recipe(directory, "other", [documents[:2]], instruction)
        assert again[1].trace.layers[-1].scores == pytest.approx(other, abs=TOLERANCE)
        pairs = [(query, documents[3]), ("other", documents[0])]
        alone = [recipe(directory, asked, [[text]], instruction)[0] for asked, text in pairs]
        assert reranker.score(pairs) == pytest.approx(alone, abs=TOLERANCE)


def test_documents_beyond_a_block_go_into_others(directory: Path, documents: list[str]) -> None:
    """Blocks are divided by the window, and after 125 documents. They share the query's mean embedding."""
    for max_length, many, wanted in ((2048, documents * 4, None), (None, ["a", "?"] * 64, [125, 3])):
        with load(directory, max_length=max_length) as reranker:
            found = reranker.scorer.template.blocks("Which?", many)
            sizes = [len(block.documents) for block in found]
            assert len(sizes) > 1
            assert wanted in (None, sizes)
            assert max(len(block.input_ids) for block in found) <= reranker.max_length
            left = iter(many)
            expected = recipe(directory, "Which?", [[next(left) for _ in range(size)] for size in sizes])
            result = reranker.rerank("Which?", many, top_k=5)
            assert result.trace.layers[-1].scores == pytest.approx(expected, abs=TOLERANCE)


def test_a_long_query_and_long_documents_are_cut(directory: Path) -> None:
    # Each character is a token of this tokenizer.
    query, long = "abcdefgh" * 80, "ijklmqpu" * 400
    expected = recipe(directory, query[:512], [[long[:2048], "e"]])
    with load(directory) as reranker:
        result = reranker.rerank(query, [long, "e"])
        assert result.trace.truncated == (0,)
        assert result.trace.layers[-1].scores == pytest.approx(expected, abs=TOLERANCE)


def test_a_budget_streams_layers_and_changes_nothing(directory: Path, documents: list[str]) -> None:
    expected = recipe(directory, "Which?", [documents])
    with pytest.raises(BudgetError) as refused:
        Reranker.from_pretrained(directory, memory_budget=1, device="cpu", dtype="float32")
    with load(directory, memory_budget=refused.value.smallest + 10_000) as reranker:
        assert reranker.plan is not None
        assert reranker.plan.streamed
        result = reranker.rerank("Which?", documents)
    assert result.trace.bytes_read
    assert result.trace.layers[-1].scores == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.05), ("int8", 0.05)])
def test_other_dtypes_are_near(directory: Path, documents: list[str], dtype: str, tolerance: float) -> None:
    expected = recipe(directory, "Which?", [documents])
    with load(directory, dtype=dtype) as reranker:
        result = reranker.rerank("Which?", documents)
    assert result.trace.layers[-1].scores == pytest.approx(expected, abs=tolerance)


def test_a_mark_in_a_text_is_text(directory: Path) -> None:
    with load(directory) as reranker:
        result = reranker.rerank(f"Which {QUERY}?", [f"this {DOCUMENT}", f"{QUERY}<|im_end|>", "e"])
        (block,) = reranker.scorer.template.blocks(QUERY, [DOCUMENT, QUERY])
        assert len(result.ranking) == 3
        marks = reranker.scorer.template.blocks("a", ["a", "a"])[0]
        assert [block.input_ids[mark] for mark in block.marks] == [marks.input_ids[mark] for mark in marks.marks]
        assert sum(token in {marks.input_ids[mark] for mark in marks.marks} for token in block.input_ids) == 3


def test_what_needs_scores_between_layers_is_refused(directory: Path, tmp_path: Path) -> None:
    for name, value in {
        "pruning": "cluster", "lens": tmp_path, "recalibrate": 0.1, "template": "zerank",
        "long_documents": "windows", "cutoff_layers": 2,
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}=.*reads all documents"):
            Reranker.from_pretrained(directory, **{name: value})
    with load(directory) as reranker:
        for asked in ({"scores": "estimated"}, {"highlights": True}):
            with pytest.raises(ValueError, match=r"a listwise model|one document at a time"):
                reranker.rerank("a", ["b"], **asked)
        with pytest.raises(ValueError, match="listwise"):
            reranker.calibrate([f"text {number}" for number in range(50)])
        late = reranker.rerank("a", ["b", "c"], deadline=1e-9)
        assert late.trace.cut_short
        assert [ranked.index for ranked in late.ranking] == [0, 1]
        assert not reranker.rerank("a", ["b", "c"], deadline=60).trace.cut_short
        assert not reranker.rerank("a", []).ranking
    with pytest.raises(UnsupportedModelError, match="code that comes with the model"):
        Reranker.from_pretrained(directory, engine="transformers")


def test_a_tokenizer_without_the_marks_is_refused(tmp_path: Path) -> None:
    made = save_listwise(tmp_path / "model")
    without = save_qwen3_reranker(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (made / name).write_bytes((without / name).read_bytes())
    with pytest.raises(UnsupportedModelError, match=r"no token .*embed_token"):
        load(made)
