"""transformers' own reader unpacks language models in GGUF files into memory."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from grating_core.errors import ModelNotFoundError, UnsupportedModelError
from grating_core.forking import Lock
from grating_core.memory.meter import Meter
from grating_core.memory.plan import MemoryPlan
from grating_core.models.adapter import Adapter
from grating_core.models.cross_encoder import CrossEncoder, Shape
from grating_core.models.families import find_family
from grating_core.models.layered import Parts, bind, without_weights
from grating_core.models.stored import OUTPUT

_INSTALL = "reading GGUF files needs the package gguf: pip install gguf"


def is_gguf(path: Path) -> bool:
    """Tell whether a model is a GGUF file."""
    return path.suffix == ".gguf" and os.path.isfile(path)  # noqa: PTH113 - Path.is_file raises for closed directories


class GgufModel:
    """This class holds a GGUF file whose configuration has been read, but no weights.

    :meth:`load` puts the whole model into memory.

    Args:
        path: The file.
        device: The device that the weights will go to.
        dtype: The compute dtype of embeddings and layers; the head is kept in float32.
        attention: The name of the attention function, as registered with transformers.
        adapter: A change that is merged into the weights.

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
        self.dtype = dtype
        self._attention = attention
        self._config = _reading(path, AutoConfig)
        with _one_at_a_time, without_weights():
            module: Any = AutoModelForCausalLM.from_config(self._config)  # type: ignore[no-untyped-call]
        self.family = find_family([type(module).__name__])
        if not self.family.asks:
            raise UnsupportedModelError(
                f"{path} holds a {type(module).__name__}, which cannot answer a question, so it cannot rerank"
            )
        self.vocabulary: int = module.get_input_embeddings().weight.shape[0]
        if adapter is not None:
            shapes = {name: tuple(weight.shape) for name, weight in module.state_dict().items()}
            head = [name for name in shapes if name.startswith(tuple(f"{part}." for part in self.family.head))]
            adapter.check(shapes, head, f"{self.family.embedding}.weight")

    @property
    def window(self) -> int:
        """The most tokens that the model can take."""
        return self.family.window(self._config)

    @property
    def shape(self) -> Shape:
        """The shape that a lens must have."""
        return Shape(self._config.num_hidden_layers, self._config.hidden_size, self.family.pooling(self._config))

    def close(self) -> None:
        """Do nothing, because no file is open."""

    def plan(self, window: int, budget: int) -> MemoryPlan:
        """Refuse a memory budget; see :meth:`StoredCrossEncoder.plan`.

        Raises:
            UnsupportedModelError: Always.
        """
        raise UnsupportedModelError(
            f"memory_budget cannot be kept with {self.directory}: a GGUF file is unpacked as a whole. Leave the "
            f"budget out, or take a safetensors version of the model"
        )

    def load(self, plan: MemoryPlan | None, answers: tuple[int, int | None] | None) -> CrossEncoder:
        """Load the model onto its device, with only the answers' rows of its output embedding.

        Args:
            plan: Always None, because a GGUF file takes no memory budget.
            answers: The tokens of yes and no; no may be None.

        Raises:
            ModelNotFoundError: The file is damaged.
        """
        assert plan is None
        assert answers is not None
        module = _reading(
            self.directory,
            AutoModelForCausalLM,
            dtype=self.dtype,
            attn_implementation=self._attention,
            **_unpacking(),
        )
        module.eval().requires_grad_(False)
        if self.adapter is not None:
            weights = module.state_dict()
            # The output embedding may also be the embedding table, so the adapter changes only the kept rows.
            for name in self.adapter.weights.keys() - {OUTPUT}:
                weights[name].copy_(self.adapter.weights[name])
            for name in self.adapter.changes.keys() - {OUTPUT}:
                self.adapter.changes[name].add_to(weights[name])
        self._keep_answers(module, answers)
        module.get_submodule(str(self.family.norm)).float()
        return CrossEncoder(Parts(module.to(self.device), self.family, self.device, self.dtype, Meter()))

    def _keep_answers(self, module: Any, answers: tuple[int, int | None]) -> None:
        """Put the answers' rows into the place of the output embedding."""
        rows = module.get_output_embeddings().weight
        assert self.family.head_module is not None
        with without_weights():
            module.lm_head = self.family.head_module(module.config).requires_grad_(False)
        module.lm_head.no = None
        # The rows are copied, because views would keep the whole table in memory.
        tokens = {name: token for name, token in zip(("yes", "no"), answers, strict=True) if token is not None}
        kept = {name: rows[token, None].to(torch.float32, copy=True) for name, token in tokens.items()}
        if self.adapter is not None:
            adapter = self.adapter.pick_rows(OUTPUT, tokens)
            for name in kept.keys() & adapter.changes.keys():
                adapter.changes[name].add_to(kept[name])
            kept |= {name: adapter.weights[name] for name in kept.keys() & adapter.weights.keys()}
        bind(module.lm_head, kept)


def gguf_tokenizer(path: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """Return the tokenizer in a GGUF file, and the settings that prompts need.

    Raises:
        ModelNotFoundError: The tokenizer cannot be read.
    """
    return _tokenizer(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=1)  # loading a model needs the tokenizer twice, and reading it is slow
def _tokenizer(path: Path, changed: int) -> tuple[Tokenizer, dict[str, Any]]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    except ImportError as error:
        raise ModelNotFoundError(_INSTALL) from error
    except Exception as error:  # a damaged file may cause any error
        raise ModelNotFoundError(f"the tokenizer in {path} cannot be read: {error}") from error
    names = ("chat_template", "bos_token", "eos_token")
    return tokenizer.backend_tokenizer, {name: getattr(tokenizer, name) for name in names}


# While transformers makes a model, it sets torch's default dtype for all threads. Two at once would mix it up.
_one_at_a_time = Lock()


def _unpacking() -> dict[str, Any]:
    """Return the argument by which transformers unpacks weights, as far as its release knows one.

    Newer releases leave weights packed if the package kernels is installed.
    """
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _reading(path: Path, kind: Any, **how: Any) -> Any:
    """Read the file with one of transformers' Auto classes."""
    try:
        with _one_at_a_time:
            return kind.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False, **how)
    except ImportError as error:
        raise ModelNotFoundError(_INSTALL) from error
    except Exception as error:  # a damaged file may cause any error
        raise ModelNotFoundError(f"{path} cannot be read as GGUF: {error}") from error
