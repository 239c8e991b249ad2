"""Language models in GGUF files, unpacked into memory by transformers' own reader."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from grating_core.errors import ModelNotFoundError, UnsupportedModelError
from grating_core.forking import Lock
from grating_core.lens.features import Shape
from grating_core.memory.meter import Meter
from grating_core.memory.plan import MemoryPlan, ModelSizes
from grating_core.models.adapter import Adapter
from grating_core.models.cross_encoder import CrossEncoder
from grating_core.models.families import find_family
from grating_core.models.layered import bind, without_weights

_OUTPUT = "lm_head.weight"
_INSTALL = "reading GGUF files takes the package gguf: pip install gguf"


def is_gguf(path: Path) -> bool:
    """Whether a model is a GGUF file."""
    return path.suffix == ".gguf" and os.path.isfile(path)  # noqa: PTH113 - Path.is_file raises for closed directories


class GgufModel:
    """A GGUF file that has been unpacked. It cannot be streamed: all its weights are in memory.

    Args:
        path: The file.
        device: Where the weights go.
        dtype: The compute dtype of embeddings and layers; the head is kept in float32.
        attention: Name of the attention function, as registered with transformers.
        adapter: Is merged into the weights.

    Raises:
        ModelNotFoundError: The file is damaged, or the package that reads it is missing.
        UnsupportedModelError: grating does not run this architecture, or the adapter is for another model.
    """

    def __init__(
        self, path: Path, *, device: torch.device, dtype: torch.dtype, attention: str, adapter: Adapter | None
    ) -> None:
        self.directory = path
        self.adapter = adapter
        self.device = device
        self._dtype = dtype
        self._module = _unpack(path, dtype=dtype, attn_implementation=attention)
        self.family = find_family([type(self._module).__name__])
        if not self.family.asks:
            raise UnsupportedModelError(f"{path} holds a {type(self._module).__name__}, which cannot be asked")
        self._module.eval().requires_grad_(False)
        if adapter is not None:
            weights = self._module.state_dict()
            head = [name for name in weights if name.startswith(tuple(f"{part}." for part in self.family.head))]
            shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
            adapter.check(shapes, head, f"{self.family.embedding}.weight")
            # Of the output embedding, which may be the embedding table as well, only rows are kept and adapted.
            for name in adapter.weights.keys() - {_OUTPUT}:
                weights[name].copy_(adapter.weights[name])
            for name in adapter.changes.keys() - {_OUTPUT}:
                adapter.changes[name].add_to(weights[name])

    @property
    def window(self) -> int:
        """The most tokens that the model can take."""
        return self.family.window(self._module.config)

    @property
    def shape(self) -> Shape:
        """What a lens has to fit."""
        config = self._module.config
        return Shape(config.num_hidden_layers, config.hidden_size, self.family.pooling(config))

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding table."""
        return int(self._module.get_input_embeddings().weight.shape[0])

    def sizes(self, window: int) -> ModelSizes:
        """See :meth:`StoredCrossEncoder.sizes`; there is nothing that a plan could leave on disk."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing is open: the file was read as a whole."""

    def load(self, plan: MemoryPlan | None, answers: tuple[int, int | None] | None) -> CrossEncoder:
        """Put the model where it computes, with nothing of its output embedding but the rows of the answers."""
        assert plan is None
        assert answers is not None
        yes, no = answers
        rows = self._module.get_output_embeddings().weight
        assert self.family.head_module is not None
        with without_weights():
            self._module.lm_head = self.family.head_module(self._module.config).requires_grad_(False)
        self._module.lm_head.no = None
        # Copies: views would hold on to the whole table.
        tokens = {name: token for name, token in (("yes", yes), ("no", no)) if token is not None}
        kept = {name: rows[token, None].to(torch.float32, copy=True) for name, token in tokens.items()}
        if self.adapter is not None:
            adapter = self.adapter.pick_rows(_OUTPUT, tokens)
            for name in kept.keys() & adapter.changes.keys():
                adapter.changes[name].add_to(kept[name])
            kept |= {name: adapter.weights[name] for name in kept.keys() & adapter.weights.keys()}
        bind(self._module.lm_head, kept)
        self._module.get_submodule(str(self.family.norm)).float()
        return CrossEncoder(
            self._module.to(self.device),
            self.family,
            self.device,
            self._dtype,
            streamer=None,
            rows=None,
            meter=Meter(),
        )


def gguf_tokenizer(path: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer in a GGUF file, and its settings as far as prompts need them.

    Raises:
        ModelNotFoundError: It cannot be read.
    """
    return _tokenizer(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=1)  # asked for twice when a model is loaded, and slow
def _tokenizer(path: Path, changed: int) -> tuple[Tokenizer, dict[str, Any]]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    except ImportError as error:
        raise ModelNotFoundError(_INSTALL) from error
    except Exception as error:  # whatever a damaged file leads to
        raise ModelNotFoundError(f"the tokenizer in {path} cannot be read: {error}") from error
    names = ("chat_template", "bos_token", "eos_token")
    return tokenizer.backend_tokenizer, {name: getattr(tokenizer, name) for name in names}


# transformers sets torch's default dtype for all threads while it unpacks: two at once would leave the wrong one.
_unpacking = Lock()


def _unpack(path: Path, **how: Any) -> Any:
    try:
        with _unpacking:
            return AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, trust_remote_code=False, **how
            )
    except ImportError as error:
        raise ModelNotFoundError(_INSTALL) from error
    except Exception as error:  # whatever a damaged file leads to
        raise ModelNotFoundError(f"{path} cannot be read as GGUF: {error}") from error
