"""This module makes transformers' own language models with gated MLPs, with or without weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from grating_core.errors import ModelNotFoundError, UnsupportedModelError
from grating_core.lab.masked import find_gated_mlp
from grating_core.models.directory import blaming_config
from grating_core.models.stored_causal_lm import StoredCausalLM


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
    architecture = _architecture(directory)
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        # Some releases prefer a way to compute attention that ignores Gemma 2's caps.
        capped = getattr(config, "attn_logit_softcapping", None) is not None
        with _without_bars():
            model = architecture.from_pretrained(
                directory,
                dtype=dtype,
                attn_implementation="eager" if capped else None,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
            )
    except Exception as error:  # damaged files may cause any error
        raise ModelNotFoundError(f"the model in {directory} cannot be read: {error}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise ModelNotFoundError(f"the tokenizer in {directory} cannot be read: {error}") from error
    return model.to(device or torch.device("cpu")).eval().requires_grad_(False), tokenizer


def _architecture(directory: Path) -> Any:
    """Return a model's class in transformers, if grating runs the model and its files are whole.

    transformers itself makes up weights that are missing.
    """
    with closing(StoredCausalLM(directory, device=torch.device("cpu"), dtype=torch.float32)) as model:
        return getattr(transformers, model.family.architecture)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Hide transformers' progress bars."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


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
