"""transformers' own reader unpacks language models in GGUF files into memory."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from grating_core.errors import ModelNotFoundError, UnsupportedModelError
from grating_core.forking import Lock
from grating_core.layers.linear import Weights
from grating_core.layers.packed import PackedLayer
from grating_core.memory.meter import Meter
from grating_core.memory.plan import MemoryPlan
from grating_core.models.adapter import Adapter
from grating_core.models.cross_encoder import CrossEncoder, Shape
from grating_core.models.directory import describe
from grating_core.models.families import find_family
from grating_core.models.layered import LosslessLayers, Parts
from grating_core.models.layout import head_names, layer_by_role, layer_names, outside_by_role, outside_names
from grating_core.models.packing import Packing
from grating_core.models.stored import OUTPUT

_INSTALL = "reading GGUF files needs the package gguf: pip install gguf"


class GgufModel:
    """This class holds a GGUF file whose configuration has been read, but no weights.

    :meth:`load` puts the whole model into memory.

    Args:
        path: The file.
        device: The device that the weights will go to.
        dtype: The compute dtype of embeddings and layers; the head is kept in float32.
        adapter: A change that is merged into the weights.

    Raises:
        ModelNotFoundError: The file is damaged, or the package that reads it is missing.
        UnsupportedModelError: grating does not run this architecture, or the adapter is for another model.
    """

    def __init__(self, path: Path, *, device: torch.device, dtype: torch.dtype, adapter: Adapter | None) -> None:
        self.directory = path
        self.adapter = adapter
        self.device = device
        self.dtype = dtype
        config = _reading(path, "AutoConfig")
        self.family = find_family(_architectures(config))
        if not self.family.asks:
            raise UnsupportedModelError(
                f"{path} holds a {self.family.architecture}, which cannot answer a question, so it cannot rerank"
            )
        self.spec = describe(path, config.to_dict(), self.family).spec
        if adapter is not None:
            family, spec = self.family, self.spec
            in_layers = [layer_names(family, layer, number) for number, layer in enumerate(spec.layers, 1)]
            outside, head = outside_names(family, spec), head_names(family, spec)
            shapes = {name: shape for names in (*in_layers, outside, head) for name, shape in names.items()}
            roles = {role: f"{name}.weight" for name, role in family.outside.items()}
            adapter.check(shapes, [*head, roles["final_norm"]], roles["table"])

    @property
    def window(self) -> int:
        """The most tokens that the model can take."""
        return self.spec.window

    @property
    def vocabulary(self) -> int:
        """The number of rows of the embedding table."""
        return self.spec.vocabulary

    @property
    def shape(self) -> Shape:
        """The shape that a lens must have."""
        return Shape.of(self.spec)

    def close(self) -> None:
        """Do nothing, because no file is open."""

    def plan(self, window: int, budget: int, packing: Packing | None) -> MemoryPlan:
        """Refuse a memory budget; see :meth:`StoredCrossEncoder.plan`.

        Raises:
            UnsupportedModelError: Always.
        """
        raise UnsupportedModelError(
            f"memory_budget cannot be kept with {self.directory}: a GGUF file is unpacked as a whole. Leave the "
            f"budget out, or take a safetensors version of the model"
        )

    def require_file(self, packing: Packing) -> None:
        """Do nothing, because no layer of a GGUF file is streamed."""

    def load(
        self,
        plan: MemoryPlan | None,
        answers: tuple[int, int | None] | None,
        packing: Packing | None,
        *,
        lossless: bool = False,
        temperature: float = 1.0,
    ) -> CrossEncoder:
        """Load the model onto its device, with only the answers' rows of its output embedding.

        Args:
            plan: Always None, because a GGUF file takes no memory budget.
            answers: The tokens of yes and no; no may be None.
            packing: How the layers are packed; None for without a loss.
            lossless: Whether to keep all layers without a loss as well.
            temperature: The number that scores are divided by, beside the model's own.

        Raises:
            ModelNotFoundError: The file is damaged.
        """
        assert plan is None
        assert answers is not None
        module = _reading(self.directory, "AutoModelForCausalLM", dtype=self.dtype, **_unpacking())
        # Tied weights are there under both names.
        named: dict[str, Tensor] = {name: weight.detach() for name, weight in module.state_dict().items()}
        head = self._answers(named.pop(OUTPUT), answers)
        if self.adapter is not None:
            # The output embedding may also be the embedding table, so the adapter changes only the kept rows.
            for name in self.adapter.weights.keys() - {OUTPUT}:
                named[name].copy_(self.adapter.weights[name])
            for name in self.adapter.changes.keys() - {OUTPUT}:
                self.adapter.changes[name].add_to(named[name])
        family, spec = self.family, self.spec
        outside = dict(outside_by_role(family, spec, named))
        outside["final_norm.weight"] = outside["final_norm.weight"].float()
        layers: dict[int, Weights | PackedLayer] = {}
        beside: dict[int, Weights | PackedLayer] = {}
        for number, layer in enumerate(spec.layers, 1):
            weights = layer_by_role(family, layer, number, named)
            layers[number] = self._placed(weights) if packing is None else packing.packed(layer, weights)
            beside |= {number: self._placed(weights)} if lossless else {}
        return CrossEncoder(
            Parts(
                family=family,
                spec=replace(spec, temperature=temperature * spec.temperature),
                device=self.device,
                dtype=self.dtype,
                meter=Meter(),
                outside=self._placed(outside),
                head=self._placed(head),
                layers=layers,
                packing=packing,
                lossless=LosslessLayers(beside, None) if lossless else None,
            )
        )

    def _placed(self, weights: Weights) -> dict[str, Tensor]:
        return {role: weight.to(self.device) for role, weight in weights.items()}

    def _answers(self, output: Tensor, answers: tuple[int, int | None]) -> dict[str, Tensor]:
        """Return the answers' rows of the output embedding, float32, by role."""
        tokens = {
            f"{name}.weight": token
            for name, token in zip(("yes", "no"), answers, strict=True)
            if token is not None
        }
        # The rows are copied, because views would keep the whole table in memory.
        kept = {name: output[token, None].to(torch.float32, copy=True) for name, token in tokens.items()}
        if self.adapter is not None:
            adapter = self.adapter.pick_rows(OUTPUT, tokens)
            for name in kept.keys() & adapter.changes.keys():
                adapter.changes[name].add_to(kept[name])
            kept |= {name: adapter.weights[name] for name in kept.keys() & adapter.weights.keys()}
        return kept


def gguf_tokenizer(path: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """Return the tokenizer in a GGUF file, and the settings that prompts need.

    Raises:
        ModelNotFoundError: The tokenizer cannot be read.
    """
    return _tokenizer(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=1)  # loading a model needs the tokenizer twice, and reading it is slow
def _tokenizer(path: Path, changed: int) -> tuple[Tokenizer, dict[str, Any]]:
    try:
        from transformers import AutoTokenizer  # importing transformers takes long

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
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _architectures(config: Any) -> list[str]:
    """Return the name of the class that transformers has for a language model with this configuration."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, config.model_type)
    return [found] if isinstance(found, str) else list(found)


def _reading(path: Path, kind: str, **how: Any) -> Any:
    """Read the file with one of transformers' Auto classes."""
    try:
        import transformers

        with _one_at_a_time:
            auto = getattr(transformers, kind)
            return auto.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False, **how)
    except ImportError as error:
        raise ModelNotFoundError(_INSTALL) from error
    except Exception as error:  # a damaged file may cause any error
        raise ModelNotFoundError(f"{path} cannot be read as GGUF: {error}") from error
