"""What a real model's MLPs were given, token by token: recorded once, replayed as often as a simulation wants."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from grating_core.columns.companion import ColumnSizes
from grating_core.errors import FileError
from grating_core.files.locks import locked
from grating_core.files.places import cache_directory, is_there
from grating_core.files.writing import make_private, replacing, require_room
from grating_core.lab.quality import cut_windows, decoder_layers
from grating_core.models.directory import blaming_config
from grating_core.models.identity import fingerprint

Magnitudes = NDArray[np.float16]

_FORMAT = "1"
_WINDOW = 512  # tokens that see each other while they are recorded
_LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class ActivationTrace:
    """Magnitudes in the gated MLPs of a dense model, by layer and token.

    Attributes:
        inputs: |x|, what each MLP is given, float16 ``[depth, tokens, D]``.
        products: |h|, its gated product, float16 ``[depth, tokens, F]``.
    """

    inputs: Magnitudes
    products: Magnitudes

    @property
    def tokens(self) -> int:
        """How many tokens were recorded."""
        return int(self.inputs.shape[1])

    def layer(self, number: int, sizes: ColumnSizes) -> tuple[Magnitudes, Magnitudes]:
        """Magnitudes of a layer, from 0, of a model of these sizes: the recorded one's, or another's.

        For another model they are made up: its layers take those of the recorded layers at the same relative
        depth, and its channels are the recorded ones, each as often as any other, in random order. That assumes
        that magnitudes of the larger model are as uneven, and change from token to token as much, as the
        recorded ones; and since repeated channels are wanted together, it keeps hit rates as they were recorded.
        Widths of other families, and training that made another model sparser or denser, are not in it.
        """
        layer = number * len(self.inputs) // sizes.depth
        chance = np.random.default_rng(number)
        return _widened(self.inputs[layer], sizes.width, chance), _widened(
            self.products[layer], sizes.products, chance
        )


def _widened(magnitudes: Magnitudes, width: int, chance: np.random.Generator) -> Magnitudes:
    there = magnitudes.shape[1]
    if width == there:
        return magnitudes
    channels = np.concatenate([chance.permutation(there) for _ in range(-(-width // there))])[:width]
    return magnitudes[:, chance.permutation(channels)]


def record(
    directory: Path, text: str, tokens: int, *, path: Path | None = None, show_progress: bool = False
) -> ActivationTrace:
    """The trace of a model on the beginning of a text: what an earlier call recorded, or recorded now.

    Args:
        directory: A decoder with gated MLPs, in Hugging Face layout.
        text: Real text: what is random has no channels that matter more than others.
        tokens: How many tokens to record.
        path: The file that holds the trace, or will; None for a place in grating's cache.
        show_progress: Show progress bars on standard error.

    Raises:
        FileError: The file is damaged, or is of another model, text or number of tokens.
        StorageError: The file cannot be written.
        UnsupportedModelError: The model has no gated MLPs.
        ValueError: The text has too few tokens.
    """
    about = {
        "format": _FORMAT,
        "model": fingerprint(directory),
        "text": hashlib.sha256(text.encode()).hexdigest(),
        "tokens": str(tokens),
    }
    key = hashlib.sha256(repr(sorted(about.items())).encode()).hexdigest()[:16]
    if path is None:
        path = cache_directory() / "activations" / f"{key}.safetensors"
        if not is_there(path):
            make_private(path.parent)
    if is_there(path):
        return _load(path, about)
    if tokens < 1:
        raise ValueError(f"tokens={tokens!r} must be 1 or more")
    with locked(path):
        if is_there(path):  # another process has recorded it meanwhile
            return _load(path, about)
        require_room(path, _size(directory, tokens))
        trace = _record(directory, text, tokens, show_progress)
        data = save({"inputs": trace.inputs, "products": trace.products}, about)
        with replacing(path, len(data), private=True) as file:  # it is derived from the text
            file.write(data)
    return trace


def _size(directory: Path, tokens: int) -> int:
    """Bytes of a trace."""
    widths = [sum(layer.mlp.gate_proj.weight.shape) for layer in decoder_layers(empty_decoder(directory))]
    return int(tokens * sum(widths) * np.dtype(np.float16).itemsize)


def _load(path: Path, about: dict[str, str]) -> ActivationTrace:
    try:
        with safe_open(path, framework="np") as file:
            found = file.metadata() or {}
            trace = ActivationTrace(file.get_tensor("inputs"), file.get_tensor("products"))
    except (SafetensorError, OSError) as error:
        raise FileError(f"{path} is no trace ({error}); delete it, and it is recorded anew") from error
    if others := [name for name in about if found.get(name) != about[name]]:
        raise FileError(
            f"{path} is the trace of another {' and '.join(others)}; delete it, or name another file to record"
        )
    return trace


@torch.inference_mode()
def _record(directory: Path, text: str, tokens: int, show_progress: bool) -> ActivationTrace:
    model, tokenizer = load_decoder(directory)
    layers = decoder_layers(model)
    length = max(2, min(_WINDOW, tokens))
    windows = cut_windows(tokenizer, text, length, -(-tokens // length))
    recorded: list[tuple[list[Magnitudes], list[Magnitudes]]] = [([], []) for _ in layers]
    hooks = [
        projection.register_forward_pre_hook(_keep(parts))
        for layer, kinds in zip(layers, recorded, strict=True)
        for projection, parts in zip((layer.mlp.gate_proj, layer.mlp.down_proj), kinds, strict=True)
    ]
    try:
        for window in tqdm(windows, "Recording activations", unit="window", disable=not show_progress):
            model.model(input_ids=window[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    inputs, products = (
        np.stack([np.concatenate(kinds[kind])[:tokens] for kinds in recorded]) for kind in range(2)
    )
    return ActivationTrace(inputs, products)


def _keep(parts: list[Magnitudes]) -> Any:
    def keep(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        parts.append(arguments[0][0].abs().clamp(max=_LARGEST).half().numpy())

    return keep


def load_decoder(directory: Path) -> tuple[Any, Any]:
    """A causal language model in float32, all of it in memory, and its tokenizer.

    Raises:
        ModelNotFoundError: The directory does not hold one.
        UnsupportedModelError: Its MLPs are not gated.
    """
    empty_decoder(directory)  # so that what cannot be pruned is not loaded
    architecture: Any = AutoModelForCausalLM
    with blaming_config(directory / "config.json"):
        model = architecture.from_pretrained(
            directory, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    return model.eval().requires_grad_(False), tokenizer


def empty_decoder(directory: Path) -> Any:
    """The same module without weights, from ``config.json`` alone.

    Raises:
        ModelNotFoundError: The configuration is missing or senseless.
        UnsupportedModelError: It is no decoder with gated MLPs.
    """
    architecture: Any = AutoModelForCausalLM
    with blaming_config(directory / "config.json"), torch.device("meta"):
        model = architecture.from_config(
            AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        )
        decoder_layers(model)
    return model
