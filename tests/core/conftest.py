"""Tiny random models of every family, and the real bundled one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    Gemma2Config,
    Gemma2ForSequenceClassification,
    Gemma3TextConfig,
    Gemma3TextForSequenceClassification,
    GemmaConfig,
    GemmaForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    Phi3Config,
    Phi3ForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    Qwen3Config,
    Qwen3ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

from grating_core import Reranker
from tests.core.bidirectional import LlamaBidirectionalConfig, LlamaBidirectionalForSequenceClassification

BUNDLED = "bundled:ms-marco-minilm-l12"
WINDOW = 96
WORDS = [f"w{number}" for number in range(200)]

# Large weights: scores of different documents must differ clearly for a comparison to mean anything.
SIZES = {
    "vocab_size": 210, "hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 4,
    "intermediate_size": 48, "initializer_range": 0.2, "num_labels": 1, "pad_token_id": 1,
}  # fmt: skip
_MODERN = {"local_attention": 16, "max_position_embeddings": WINDOW, "bos_token_id": 0, "eos_token_id": 2,
           "cls_token_id": 0, "sep_token_id": 2}  # fmt: skip
DECODER = {"num_key_value_heads": 2, "max_position_embeddings": WINDOW, "head_dim": 12}
SLIDING = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}
_DISTILBERT = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
               "intermediate_size": "hidden_dim"}  # fmt: skip
# Distances beyond 4 tokens share rows, and the longest sequences have distances that are clamped.
DEBERTA = {
    "relative_attention": True, "pos_att_type": "p2c|c2p", "share_att_key": True, "norm_rel_ebd": "layer_norm",
    "position_buckets": 8, "max_relative_positions": 80, "position_biased_input": False,
    "max_position_embeddings": WINDOW,
}  # fmt: skip
_GLOBAL, _LOCAL = "full_attention", "sliding_attention"

FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**SIZES, max_position_embeddings=WINDOW)),
    "roberta": lambda: RobertaForSequenceClassification(
        RobertaConfig(**SIZES, max_position_embeddings=WINDOW + 2, type_vocab_size=1)
    ),
    "xlm-roberta": lambda: XLMRobertaForSequenceClassification(
        XLMRobertaConfig(**SIZES, max_position_embeddings=WINDOW + 2, type_vocab_size=1)
    ),
    "electra": lambda: ElectraForSequenceClassification(  # its tables are narrower than its layers
        ElectraConfig(**SIZES, max_position_embeddings=WINDOW, embedding_size=20)
    ),
    "distilbert": lambda: DistilBertForSequenceClassification(
        DistilBertConfig(
            **{_DISTILBERT.get(name, name): value for name, value in SIZES.items()}, max_position_embeddings=WINDOW
        )
    ),
    "deberta-v3": lambda: DebertaV2ForSequenceClassification(DebertaV2Config(**SIZES, **DEBERTA)),
    "deberta-v2": lambda: DebertaV2ForSequenceClassification(
        DebertaV2Config(
            **SIZES,
            **(DEBERTA | {"share_att_key": False, "position_buckets": -1, "position_biased_input": True}),
            type_vocab_size=2,
        )
    ),
    "modernbert-cls": lambda: ModernBertForSequenceClassification(
        ModernBertConfig(
            **SIZES, **_MODERN, classifier_pooling="cls", layer_types=[_GLOBAL, _LOCAL, _LOCAL, _GLOBAL, _LOCAL]
        )
    ),
    "modernbert-mean": lambda: ModernBertForSequenceClassification(
        ModernBertConfig(
            **SIZES, **_MODERN, classifier_pooling="mean", layer_types=[_GLOBAL, *[_LOCAL] * 3, _GLOBAL]
        )
    ),
    "llama": lambda: LlamaForSequenceClassification(LlamaConfig(**SIZES, **DECODER, attention_bias=True)),
    "mistral": lambda: MistralForSequenceClassification(MistralConfig(**SIZES, **DECODER, sliding_window=16)),
    "qwen2": lambda: Qwen2ForSequenceClassification(Qwen2Config(**SIZES, **DECODER, **SLIDING)),
    "qwen3": lambda: Qwen3ForSequenceClassification(Qwen3Config(**SIZES, **DECODER)),
    "gemma": lambda: GemmaForSequenceClassification(GemmaConfig(**SIZES, **DECODER)),
    "gemma2": lambda: Gemma2ForSequenceClassification(
        Gemma2Config(**SIZES, **DECODER, sliding_window=16, query_pre_attn_scalar=9, attn_logit_softcapping=2.0)
    ),
    "gemma3": lambda: Gemma3TextForSequenceClassification(
        Gemma3TextConfig(**SIZES, **DECODER, sliding_window=16, query_pre_attn_scalar=9, sliding_window_pattern=3)
    ),
    "phi3": lambda: Phi3ForSequenceClassification(
        Phi3Config(**SIZES, num_key_value_heads=2, max_position_embeddings=WINDOW, sliding_window=16)
    ),
    "llama-both-ways": lambda: LlamaBidirectionalForSequenceClassification(
        LlamaBidirectionalConfig(**SIZES, **DECODER, pooling="avg", temperature=0.5)
    ),
}


def save_tokenizer(directory: Path, *, types: bool) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with BERT's pairs (``types``) or RoBERTa's, which double the separator."""
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = {token: number for number, token in enumerate([*specials, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1" if types else "<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    names = ["input_ids", "token_type_ids", "attention_mask"] if types else ["input_ids", "attention_mask"]
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="<s>", sep_token="</s>", pad_token="<pad>", unk_token="<unk>",
        model_max_length=WINDOW, model_input_names=names,
    )  # fmt: skip
    wrapped.save_pretrained(directory)
    return wrapped


def randomise(model: PreTrainedModel) -> PreTrainedModel:
    """Biases and norms start as zeros and ones, which would hide one that is missing or misplaced.

    Weights of Gemma's norms start as zeros too, since 1 is added. Norms of queries and keys twice as large would
    make each attention a choice of one token, which any rounding changes.
    """
    for name, weight in model.named_parameters():
        if name.endswith("bias") or "norm" in name.lower():
            torch.nn.init.normal_(weight, mean=float(weight.detach().mean()), std=0.2)
    return model


def save_model(directory: Path, family: str, seed: int = 0, **saving: object) -> Path:
    """A tiny model of a family with random weights, and its tokenizer, in Hugging Face layout."""
    torch.manual_seed(seed)
    model = randomise(FAMILIES[family]())
    model.save_pretrained(directory, **saving)
    save_tokenizer(directory, types=family in ("bert", "electra", "deberta-v2"))
    return directory


@pytest.fixture(scope="session", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny model, one for each family."""
    return save_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("bert"), "bert")


@pytest.fixture(scope="session")
def bundled() -> Reranker:
    """The real model, unpruned and in float32."""
    return Reranker.from_pretrained(BUNDLED, pruning="off", dtype="float32", device="cpu")


@pytest.fixture
def spill_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRATING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def without_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration does not look at 8 bits, as where no kernels compute them: it would take ten times as long."""
    monkeypatch.setattr("grating_core.calibrating.knows_8_bits", lambda scorer: False)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Compute with so many threads, as threads do that begin meanwhile, whatever the processor has."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_threads() -> Iterator[None]:
    with torch_threads(2):
        yield
