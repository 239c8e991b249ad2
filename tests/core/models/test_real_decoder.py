"""A real decoder: SmolLM2-135M-Instruct from a GGUF file, and an adapter that makes it a reranker."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.shapes import smollm2_file, write_smollm2
from grating_core import ModelNotFoundError, Prompt, Reranker
from tests.core.parity import TOLERANCE, load

ADAPTER = Path(__file__).parents[4] / "shared" / "models" / "smollm2-reranker-lora"
BEFORE = (
    '<|im_start|>system\nJudge whether the Document is relevant to the Query. Answer only "yes" or "no".'
    "<|im_end|>\n<|im_start|>user\n<Query>: {query}\n<Document>: "
)
AFTER = "<|im_end|>\n<|im_start|>assistant\n"
PROMPT = Prompt(pieces=(BEFORE, "{document}", AFTER))
QUERY = "How many people live in Berlin?"
DOCUMENTS = [
    "New York City is famous for the Metropolitan Museum of Art.",
    "Berlin had a population of 3,520,031 registered inhabitants in an area of 891.82 square kilometers.",
    "",
    "Berlin is well known for its museums.",
    "Bread needs flour, water, salt and yeast. " * 20,
]


@pytest.fixture(scope="module")
def gguf() -> Path:
    try:
        return smollm2_file()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def adapter() -> Path:
    if not ADAPTER.is_dir():
        pytest.skip("the adapter is not here")
    return ADAPTER


@pytest.fixture(scope="module")
def tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


@pytest.fixture(scope="module")
def base(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as safetensors, which can be streamed."""
    return write_smollm2(tmp_path_factory.mktemp("base") / "SmolLM2-135M-Instruct")


@pytest.fixture(scope="module")
def expected(base: Path, adapter: Path, tokenizer: PreTrainedTokenizerBase) -> list[float]:
    """Each sequence alone through transformers' model, with the adapter merged as PEFT does."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    merge(model, adapter, scale=32 / 16)
    yes, no = (tokenizer.encode(word, add_special_tokens=False)[0] for word in ("yes", "no"))
    scores = []
    for document in DOCUMENTS:
        pieces = (BEFORE.replace("{query}", QUERY), document, AFTER)
        ids = [token for piece in pieces for token in tokenizer.encode(piece, add_special_tokens=False)]
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, -1]
        scores.append(float(logits[yes] - logits[no]))
    return scores


@torch.no_grad()
def merge(model: nn.Module, adapter: Path, scale: float) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, down in tensors.items():
        if "lora_A" in name:
            weight = model.get_parameter(name.removeprefix("base_model.model.").replace("lora_A.", ""))
            weight += scale * tensors[name.replace("lora_A", "lora_B")].float() @ down.float()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["gguf", "resident", "budget"])
def test_scores_equal_transformers(gguf: Path, base: Path, adapter: Path, expected: list[float], how: str) -> None:
    settings = {"memory_budget": "200MB", "max_length": 512} if how == "budget" else {}
    reranker = load(gguf if how == "gguf" else base, template=PROMPT, adapter=adapter, **settings)
    result = reranker.rerank(QUERY, DOCUMENTS, len(DOCUMENTS))
    scores = {ranked.index: ranked.score for ranked in result.ranking}
    assert scores == pytest.approx(dict(enumerate(expected)), abs=TOLERANCE)
    assert result.ranking[0].index == 1
    assert result.trace.shared_prefix > 30
    if how == "budget":
        assert len(reranker.plan.streamed) > 20
        assert result.trace.bytes_read > 300_000_000
    reranker.close()


@pytest.mark.slow
def test_the_instruct_model_alone_is_asked_in_its_chat_format(gguf: Path, base: Path) -> None:
    scores = [load(directory).score([(QUERY, text) for text in DOCUMENTS]) for directory in (gguf, base)]
    assert scores[0] == pytest.approx(scores[1], abs=TOLERANCE)
    assert max(scores[0]) - min(scores[0]) > 0.1


@pytest.mark.slow  # transformers makes the tokenizer, which takes seconds
def test_a_gguf_file_is_streamed_within_a_budget(gguf: Path) -> None:
    settings = {"template": PROMPT, "max_length": 256}
    expected = load(gguf, **settings).score([(QUERY, text) for text in DOCUMENTS])
    with load(gguf, memory_budget="130MB", **settings) as reranker:
        assert reranker.score([(QUERY, text) for text in DOCUMENTS]) == pytest.approx(expected, abs=TOLERANCE)
        assert len(reranker.plan.streamed) > 20


def test_a_damaged_gguf_file(gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf.read_bytes()[:100_000])
    with pytest.raises(ModelNotFoundError, match=r"model\.gguf"):
        Reranker.from_pretrained(path)
