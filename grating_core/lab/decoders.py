"""This module makes transformers' own language models with gated MLPs, with or without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from grating_core.columns.masks import find_gated_mlp
from grating_core.errors import ModelNotFoundError, UnsupportedModelError
from grating_core.lifetime import closed_on_error
from grating_core.models.causal_lm import StoredCausalLM
from grating_core.models.directory import blaming_config


def load_decoder(
    directory: Path, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """Load a whole language model into memory, and its tokenizer.

    Args:
        directory: A model in Hugging Face layout with safetensors weights.
        device: Device of the weights; None for the CPU.
        dtype: Dtype of the weights.

    Raises:
        ModelNotFoundError: The directory holds no model, or a damaged one.
        UnsupportedModelError: grating does not run the model, or its MLPs are not gated.
    """
    stored = StoredCausalLM(directory, device=device or torch.device("cpu"), dtype=dtype, attention=None)
    with closed_on_error(stored):
        decoder_layers(stored.module)  # a model that cannot be pruned is refused before it is loaded
        stored.load(None)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # damaged files may cause any error
        raise ModelNotFoundError(f"the tokenizer in {directory} cannot be read: {error}") from error
    return stored.module, tokenizer


def empty_decoder(directory: Path) -> Any:
    """Make a language model without weights, from ``config.json`` alone.

    Raises:
        ModelNotFoundError: The configuration is missing or makes no sense.
        UnsupportedModelError: The model is not a decoder with gated MLPs.
    """
    architecture: Any = AutoModelForCausalLM
    with blaming_config(directory / "config.json"), torch.device("meta"):
        model = architecture.from_config(
            AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        )
        decoder_layers(model)
    return model


def decoder_layers(model: Any) -> Any:
    """Return the layers of a causal language model of transformers, all with gated MLPs.

    Raises:
        UnsupportedModelError: The model is not causal, or its MLPs are not gated.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not layers:
        raise UnsupportedModelError(
            f"mlp_density is for decoders with gated MLPs, such as Llama, Qwen or Gemma, but this model is a "
            f"{type(model).__name__}"
        )
    for layer in layers:
        find_gated_mlp(layer)
    return layers
