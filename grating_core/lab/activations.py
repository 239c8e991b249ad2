"""This module records activations of a real model's MLPs, token by token, for any number of simulations."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
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

from grating_core.columns.companion import ColumnSizes
from grating_core.errors import FileError
from grating_core.files.locks import locked
from grating_core.files.places import cache_directory, is_there
from grating_core.files.writing import make_private, replacing, require_room
from grating_core.lab.decoders import decoder_layers, empty_decoder, load_decoder
from grating_core.lab.quality import cut_windows
from grating_core.models.identity import fingerprint

Magnitudes = NDArray[np.float16]

WINDOW = 512  # tokens of a recorded sequence
_FORMAT = "1"
_LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Activations:
    """This class holds magnitudes in the gated MLPs of a dense model, by layer and token.

    Attributes:
        inputs: Magnitudes of each MLP's input, float16 ``[depth, tokens, D]``.
        products: Magnitudes of each MLP's gated product, float16 ``[depth, tokens, F]``.
    """

    inputs: Magnitudes
    products: Magnitudes

    def layer(self, number: int, sizes: ColumnSizes) -> tuple[Magnitudes, Magnitudes]:
        """Return the magnitudes of a layer of a model of these sizes: the recorded model, or another one.

        The magnitudes of another model are made up. Its layers copy the recorded layers at the same relative
        depth. Its channels copy the recorded channels, each equally often, in random order. This assumes that
        magnitudes of the larger model are as uneven, and change from token to token as much, as the recorded ones.
        Copies of a channel are used together, so hit rates stay as recorded. The method does not know the widths
        of other families, or models that training made sparser or denser.

        Args:
            number: Number of the layer, from 0.
            sizes: Sizes of the model's MLPs.

        Returns:
            Inputs ``[tokens, D]`` and products ``[tokens, F]``.
        """
        layer = number * len(self.inputs) // sizes.depth
        # Inputs of all layers have the same channels: those of the hidden states.
        return (
            _widened(self.inputs[layer], sizes.width, np.random.default_rng(0)),
            _widened(self.products[layer], sizes.products, np.random.default_rng(number)),
        )


def _widened(magnitudes: Magnitudes, width: int, chance: np.random.Generator) -> Magnitudes:
    there = magnitudes.shape[1]
    if width == there:
        return magnitudes
    channels = np.concatenate([chance.permutation(there) for _ in range(-(-width // there))])[:width]
    return magnitudes[:, chance.permutation(channels)]


def record_activations(
    directory: Path, text: str, tokens: int, *, path: Path | None = None, show_progress: bool = False
) -> Activations:
    """Return a model's activations on the beginning of a text. They are recorded unless an earlier call did so.

    Args:
        directory: Directory of a decoder with gated MLPs, in Hugging Face layout.
        text: A real text. In random text no channel matters more than others.
        tokens: Number of tokens to record.
        path: The file of the activations, which may not exist yet; None for a place in grating's cache.
        show_progress: Whether to show progress bars on standard error.

    Raises:
        FileError: The file is damaged, or belongs to another model, text or number of tokens.
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
    if path is None:
        key = hashlib.sha256(repr(sorted(about.items())).encode()).hexdigest()[:16]
        path = cache_directory() / "activations" / f"{key}.safetensors"
        if not is_there(path):
            make_private(path.parent)
    if is_there(path):
        return _load(path, about)
    if tokens < 1:
        raise ValueError(f"tokens={tokens!r} must be 1 or more")
    with locked(path):
        if is_there(path):  # another process has recorded the activations meanwhile
            return _load(path, about)
        widths = [sum(layer.mlp.gate_proj.weight.shape) for layer in decoder_layers(empty_decoder(directory))]
        require_room(path, tokens * sum(widths) * np.dtype(np.float16).itemsize)
        found = _record(directory, text, tokens, show_progress)
        data = save({"inputs": found.inputs, "products": found.products}, about)
        with replacing(path, len(data), private=True) as file:  # the text shows in its activations
            file.write(data)
    return found


def _load(path: Path, about: dict[str, str]) -> Activations:
    try:
        with safe_open(path, framework="np") as file:
            found = file.metadata() or {}
            activations = Activations(file.get_tensor("inputs"), file.get_tensor("products"))
    except (SafetensorError, OSError) as error:
        raise FileError(f"{path} holds no activations ({error}); delete it and call again") from error
    if others := [name for name in about if found.get(name) != about[name]]:
        raise FileError(
            f"{path} has the activations of another {' and '.join(others)}; delete it, or name another file"
        )
    return activations


def _record(directory: Path, text: str, tokens: int, show_progress: bool) -> Activations:
    model, tokenizer = load_decoder(directory)
    length = max(2, min(WINDOW, tokens))
    windows = cut_windows(tokenizer, text, length, -(-tokens // length))
    found = record(model, list(windows), show_progress=show_progress)
    return Activations(found.inputs[:, :tokens], found.products[:, :tokens])


@torch.inference_mode()
def record(model: Any, windows: Sequence[Tensor], *, show_progress: bool = False) -> Activations:
    """Record a model's activations.

    Args:
        model: A causal language model of transformers with gated MLPs, in memory.
        windows: The token ids of texts, int64 ``[T]`` each.
        show_progress: Whether to show a progress bar on standard error.

    Returns:
        The activations of all tokens of the texts, one text behind the other.

    Raises:
        UnsupportedModelError: The model has no gated MLPs.
    """
    layers = decoder_layers(model)
    recorded: list[tuple[list[Magnitudes], list[Magnitudes]]] = [([], []) for _ in layers]

    def keeping(parts: list[Magnitudes]) -> Any:
        def keep(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            parts.append(arguments[0][0].abs().clamp(max=_LARGEST).half().numpy())

        return keep

    hooks = []
    for layer, (inputs, products) in zip(layers, recorded, strict=True):
        hooks.append(layer.mlp.gate_proj.register_forward_pre_hook(keeping(inputs)))
        hooks.append(layer.mlp.down_proj.register_forward_pre_hook(keeping(products)))
    for window in tqdm(windows, "Recording activations", unit="window", disable=not show_progress):
        model.model(input_ids=window[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return Activations(
        *(np.stack([np.concatenate(parts) for parts in kind]) for kind in zip(*recorded, strict=True))
    )
