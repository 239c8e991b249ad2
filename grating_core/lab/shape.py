"""A shape is all that the simulator knows of a model: what its parts are, and what they take in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from grating_core.columns.companion import ColumnSizes
from grating_core.columns.install import MlpPruning, column_sizes
from grating_core.lab.decoders import empty_decoder
from grating_core.layers.packed import layout_of_weight
from grating_core.memory.header import KIND_OF
from grating_core.memory.plan import MemoryPlan, ModelSizes, make_generation_plan
from grating_core.models.family import Family, ModelSpec
from grating_core.models.packing import Packing, generating
from grating_core.models.stored_causal_lm import StoredCausalLM
from grating_core.opening.language_models import USUAL_LENGTH
from grating_core.text.windows import find_window

_DENSITY = 0.5  # every density takes the same memory


@dataclass(frozen=True)
class Form:
    """A form is the way in which a model's weights are kept: dense, or with columns of pruned MLPs.

    Attributes:
        sizes: Sizes of the parts in memory.
        packing: How the layers are packed; None if torch computes them.
        window: The most tokens of a prompt together with its continuation.
    """

    sizes: ModelSizes
    packing: Packing | None
    window: int

    def plan(self, budget: int) -> MemoryPlan:
        """Spend a memory budget as the engine does.

        Raises:
            BudgetError: The budget is too small.
        """
        return make_generation_plan(self.sizes, budget, self.window)


@dataclass(frozen=True)
class Shape:
    """A shape describes a language model with gated MLPs on the CPU.

    Attributes:
        family: The description of the model's family.
        spec: The description of the model.
        dtype: The dtype of states, and of weights that are not quantised.
        dense: The model with dense MLPs.
        pruned: The model with pruned MLPs.
        columns: Sizes of the columns of pruned MLPs.
        tied: Whether the embedding table is the output embedding as well.
        kv_bits: Bits of keys and values, 8; None for the dtype of states.
    """

    family: Family
    spec: ModelSpec
    dtype: torch.dtype
    dense: Form
    pruned: Form
    columns: ColumnSizes
    tied: bool
    kv_bits: int | None = None

    @classmethod
    def of(
        cls,
        directory: Path,
        dtype: torch.dtype,
        bits: int | None = None,
        max_length: int | None = None,
        kv_bits: int | None = None,
    ) -> Shape:
        """Find the shape of a model, from its ``config.json`` alone if its weights are not there.

        Args:
            directory: Directory of the file.
            dtype: Dtype of states, and of weights that are not quantised.
            bits: Bits of a quantised weight, 8 or 4; None for weights in the dtype.
            max_length: The most tokens of a prompt together with its continuation; None for what a model is
                loaded with.
            kv_bits: Bits of keys and values, 8; None for the dtype.

        Raises:
            ModelNotFoundError: The file is missing or makes no sense.
            UnsupportedModelError: The model is not a decoder with gated MLPs.
            ValueError: ``max_length`` is not what the model can take.
        """
        packing = None if bits is None else generating(bits, dtype)
        forms = []
        with _with_weights(directory, dtype) as place:
            for pruning in (None, MlpPruning(_DENSITY, bits=bits)):
                stored = StoredCausalLM(
                    place,
                    device=torch.device("cpu"),
                    dtype=dtype,
                    pruning=pruning,
                    packing=packing,
                    kv_bits=kv_bits,
                )
                with closing(stored):
                    window = find_window(directory, stored.window, max_length, USUAL_LENGTH)
                    forms.append(Form(stored.sizes(window), stored.packing, window))
        columns, (dense, pruned) = column_sizes(stored.spec.layers, dtype, bits), forms
        tied = dense.sizes.table_needed
        return cls(stored.family, stored.spec, dtype, dense, pruned, columns, tied, kv_bits)

    @property
    def depth(self) -> int:
        """The number of layers."""
        return self.spec.depth

    @property
    def head(self) -> int:
        """The bytes of the output embedding."""
        packing, spec = self.dense.packing, self.spec
        if packing is None or packing.output is None:
            return spec.vocabulary * spec.width * self.dtype.itemsize
        layout = layout_of_weight(spec.vocabulary, spec.width, packing.states, packing.output)
        return sum(dtype.itemsize * prod(size) for dtype, size in layout.values())


@contextmanager
def _with_weights(directory: Path, dtype: torch.dtype) -> Iterator[Path]:
    """Yield the directory, or one with a file that has a checkpoint's header and a hole for the weights."""
    with ExitStack() as stack:
        if not any(directory.glob("*.safetensors")):
            model = empty_decoder(directory)
            place = Path(stack.enter_context(TemporaryDirectory()))
            shutil.copy(directory / "config.json", place)
            header, end = {}, 0
            for name, weight in model.state_dict().items():
                if name == "lm_head.weight" and model.config.tie_word_embeddings:
                    continue
                start, end = end, end + weight.numel() * dtype.itemsize
                header[name] = {"dtype": KIND_OF[dtype], "shape": [*weight.shape], "data_offsets": [start, end]}
            text = json.dumps(header).encode()
            with (place / "model.safetensors").open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                file.truncate(8 + len(text) + end)
            directory = place
        yield directory
