"""Tiny random models in the official file layout of each row of the table in docs/models.md, by architecture."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.core.conftest import DECODER, FAMILIES, SIZES, randomise, save_model
from tests.core.engine.test_listwise import save_listwise
from tests.core.engine.test_padded import saved
from tests.core.models.test_decoders import MINICPM, minicpm_weights
from tests.core.models.test_logit_scores import TEMPLATES, save_causal
from tests.core.models.test_modules import save_modular
from tests.core.models.test_remote import GTE, JINA, gte_weights, jina_weights, write
from tests.core.text.test_prompts import save_qwen3_reranker

Build = Callable[[Path], Path]


def change(directory: Path, **fields: object) -> Path:
    """The same model with other fields in its configuration."""
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return directory


def family(name: str, **fields: object) -> Build:
    """A model of one of the tests' families, which are read without a prompt."""
    return lambda directory: change(save_model(directory, name), **fields)


def prompted(directory: Path) -> tuple[Path, dict[str, Any]]:
    """A tokenizer that has the words of every prompt, and the sizes of a decoder for it."""
    made = save_qwen3_reranker(directory.parent / "tokenizer of" / directory.name)
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((made / name).read_bytes())
    rows = json.loads((made / "config.json").read_text())["vocab_size"]
    return directory, SIZES | DECODER | {"vocab_size": rows, "max_position_embeddings": 1024}


def decoder(architecture: str, **fields: object) -> Build:
    """A model that is asked with a prompt."""

    def build(directory: Path) -> Path:
        directory, sizes = prompted(directory)
        text = architecture.partition("For")[0].replace("Gemma3", "Gemma3Text").replace("TextText", "Text")
        if architecture.startswith(("Granite", "Phi3")):
            del sizes["head_dim"]
        config = getattr(transformers, f"{text}Config")(**sizes | fields)
        torch.manual_seed(0)
        randomise(getattr(transformers, architecture)(config)).save_pretrained(directory)
        return directory

    return build


def minicpm(directory: Path) -> Path:
    directory, sizes = prompted(directory)
    rows = {"vocab_size": sizes["vocab_size"], "max_position_embeddings": 1024}
    (directory / "config.json").write_text(json.dumps(MINICPM | rows))
    table = {"model.embed_tokens.weight": 0.2 * torch.randn(sizes["vocab_size"], 32)}
    save_file(minicpm_weights() | table, directory / "model.safetensors", {"format": "pt"})
    return directory


def lightweight(directory: Path) -> Path:
    directory = decoder("Gemma2ForCausalLM", query_pre_attn_scalar=9, tie_word_embeddings=True)(directory)
    own = {"start_layer": 3, "layer_sep": 1, "layer_wise": True, "model_type": "cost_wise_gemma"}
    change(directory, architectures=["CostWiseGemmaForCausalLM"], **own)
    weights = load_file(directory / "model.safetensors")
    weights |= {f"lm_head.{number}.linear_head.weight": torch.randn(1, 32) for number in range(3)}
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


def ettin(directory: Path) -> Path:
    return save_modular(directory, "modernbert-cls", "ettin")


def foreign(name: str) -> Build:
    """A model that only transformers computes."""
    return lambda directory: saved(directory, name)


def code_of_its_own(architecture: str, model_type: str) -> Build:
    """A model that code in its checkpoint computes."""
    named = {"AutoModelForSequenceClassification": f"modeling.{architecture}"}
    return family("bert", architectures=[architecture], model_type=model_type, auto_map=named)


def three_labels(directory: Path) -> Path:
    labels = {str(number): name for number, name in enumerate(("contradiction", "entailment", "neutral"))}
    return change(save_model(directory, "deberta-v3"), id2label=labels, label2id={})


CLASSIFIERS = {
    "BertForSequenceClassification": "bert",
    "RobertaForSequenceClassification": "roberta",
    "XLMRobertaForSequenceClassification": "xlm-roberta",
    "ElectraForSequenceClassification": "electra",
    "DistilBertForSequenceClassification": "distilbert",
    "DebertaV2ForSequenceClassification": "deberta-v3",
    "ModernBertForSequenceClassification": "modernbert-cls",
    "LlamaForSequenceClassification": "llama",
    "MistralForSequenceClassification": "mistral",
    "Qwen2ForSequenceClassification": "qwen2",
    "GemmaForSequenceClassification": "gemma",
    "Gemma2ForSequenceClassification": "gemma2",
    "Gemma3TextForSequenceClassification": "gemma3",
    "Phi3ForSequenceClassification": "phi3",
}
DECODERS = (
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GemmaForCausalLM",
    "Gemma2ForCausalLM", "Gemma3ForCausalLM", "GraniteForCausalLM", "Phi3ForCausalLM",
    "Qwen3ForSequenceClassification",
)  # fmt: skip

BUILDERS: dict[str, Build] = {
    **{architecture: family(name) for architecture, name in CLASSIFIERS.items() if name in FAMILIES},
    **{architecture: decoder(architecture) for architecture in DECODERS},
    "LayerWiseMiniCPMForCausalLM": minicpm,
    "CostWiseGemmaForCausalLM": lightweight,
    "LlamaBidirectionalForSequenceClassification": family("llama-both-ways"),
    "NewForSequenceClassification": lambda directory: write(directory, GTE, gte_weights(GTE)),
    "XLMRobertaForSequenceClassification of Jina": lambda directory: write(directory, JINA, jina_weights(JINA)),
    "ModernBertModel and modules": ettin,
    "LlamaForCausalLM and LogitScore": lambda directory: save_causal(directory, TEMPLATES["structured"]),
    "CamembertForSequenceClassification": foreign("camembert"),
    "AlbertForSequenceClassification": foreign("albert"),
    "MPNetForSequenceClassification": foreign("mpnet"),
    "JinaBertForSequenceClassification": code_of_its_own("JinaBertForSequenceClassification", "bert"),
    "JinaForRanking": save_listwise,
    "T5ForConditionalGeneration": family("bert", architectures=["T5ForConditionalGeneration"], model_type="t5"),
    "XLMRobertaModel": family("xlm-roberta", architectures=["XLMRobertaModel"]),
    "DebertaV2ForSequenceClassification with three labels": three_labels,
}
"""What builds a model of an architecture in a directory, which it returns."""
