"""This module turns settings into everything but the weights: files, family, prompt, window, identity and plan.

This is the only way in: reranking, generating, the command line and the benchmarks open models here.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from grating_core.columns.install import mlp_pruning
from grating_core.engine.recount import Recount
from grating_core.engine.scorer import Scorer
from grating_core.errors import StorageError, UnsupportedModelError
from grating_core.files.places import expanded
from grating_core.kernels.choice import kernels
from grating_core.lens.pruning import ByLens
from grating_core.lens.store import CalibratedLens, find_lens, open_lens, warn_once
from grating_core.lifetime import closed_on_error
from grating_core.memory.meter import resident_memory
from grating_core.memory.plan import MemoryPlan
from grating_core.models.adapter import Adapter, find_adapter
from grating_core.models.causal_lm import CausalLM, StoredCausalLM
from grating_core.models.cross_encoder import StoredCrossEncoder, StoredReranker
from grating_core.models.directory import find_model, is_gguf
from grating_core.models.gguf import GgufModel
from grating_core.models.hub import Hub
from grating_core.models.identity import fingerprint
from grating_core.models.packing import QUANTIZED, Packing
from grating_core.models.placement import choose_device, choose_dtype, states_dtype
from grating_core.pruning import ClusterPolicy, Off, PruningPolicy
from grating_core.settings import GenerationSettings, ModelSettings, RerankSettings
from grating_core.text.chat import PromptTokenizer
from grating_core.text.pairs import load_template
from grating_core.text.prompts import Prompt, find_prompt, usual_length
from grating_core.text.windows import find_window

_log = logging.getLogger("grating")
_USUAL_LENGTH = 4096  # tokens of a prompt and its continuation, if the user gives no limit


@dataclass(frozen=True)
class OpenReranker:
    """This class knows everything about a reranker but its weights.

    Attributes:
        settings: The settings that the reranker was opened with.
        stored: The reranker's files.
        prompt: The question to the model; None if the tokenizer joins the two texts without a question.
        window: The most tokens of a pair.
    """

    settings: RerankSettings
    stored: StoredReranker
    prompt: Prompt | None
    window: int

    @property
    def directory(self) -> Path:
        """The local directory, or the GGUF file, that the weights are read from."""
        return self.stored.directory

    @cached_property
    def identity(self) -> str:
        """The identity of the model and of its question, see :func:`grating_core.models.identity.fingerprint`."""
        asked = "" if self.prompt is None else self.prompt.asked
        return fingerprint(self.directory, self.stored.adapter, asked)

    @cached_property
    def lens(self) -> CalibratedLens | None:
        """The lens that the settings name, or the one of this model; None if there is none.

        Raises:
            FileError: The lens in the settings is missing or damaged, or is for other weights.
        """
        if self.settings.lens is None:
            return find_lens(self.identity, self.stored.shape)
        return open_lens(expanded(self.settings.lens), self.stored.shape, self.identity)

    @cached_property
    def packing(self) -> Packing | None:
        """How the layers are packed; None for without a loss.

        ``"auto"`` takes 8 bits on the CPU where kernels compute them, if calibration found that they agree, and if
        the file can be written that layers in 8 bits are streamed from.
        """
        dtype = self.settings.dtype
        if dtype not in ("auto", "int8"):
            return None
        packing = Packing(self.stored.dtype, QUANTIZED)
        if dtype == "int8":
            return packing
        fast = self.stored.device.type == "cpu" and kernels().has(torch.int8)
        found = None if self.lens is None else self.lens.int8
        agrees = found is not None and found.agrees(alone=self.settings.budget is not None)
        return packing if fast and agrees and self._streams(packing) else None

    @property
    def doubt(self) -> float | None:
        """The distance from the bar of the top K within which scores are recounted without 8 bits; None for never.

        A budget has no room for the layers without 8 bits.
        """
        found = None if self.packing is None or self.lens is None else self.lens.int8
        return None if found is None or self.settings.budget is not None else found.recounts.doubt

    def _streams(self, packing: Packing) -> bool:
        """Tell whether layers in this packing can be streamed, if the budget streams any; the log says why not."""
        budget = self.settings.budget
        try:
            if budget is not None and self.stored.plan(self.window, budget, packing).streamed:
                self.stored.require_file(packing)
        except StorageError as error:
            warn_once(
                f"dtype='auto' takes {str(self.stored.dtype).removeprefix('torch.')} and not 8 bits: {error}"
            )
            return False
        return True

    @cached_property
    def plan(self) -> MemoryPlan | None:
        """The plan of the memory budget; None without a budget.

        Raises:
            BudgetError: The budget is too small; the message states the smallest that works.
        """
        budget = self.settings.budget
        return None if budget is None else self.stored.plan(self.window, budget, self.packing)

    def pruning(self) -> PruningPolicy | ByLens:
        """Return the pruning of the settings. ``"auto"`` reads :attr:`lens`."""
        chosen = self.settings.pruning
        if not isinstance(chosen, str):
            return chosen
        if chosen != "auto":
            return ClusterPolicy() if chosen == "cluster" else Off()
        lens, wanted = self.lens, "lens"
        if lens is not None and self.packing is not None:
            # Margins for the model without 8 bits promise nothing of the model with them.
            lens, wanted = lens.in_8_bits(alone=self.doubt is None), "lens with margins for 8 bits"
        lens = None if lens is None else lens.to(self.stored.device)
        return ByLens(float(self.settings.target), self.settings.guarantee, lens, str(self.directory), wanted)

    def load(self, *, recounts: bool = True) -> Scorer:
        """Read tokenizer and weights.

        Args:
            recounts: Whether a model in 8 bits may keep the layers without 8 bits as well, to recount what is in
                doubt.

        Raises:
            ModelNotFoundError: The files are damaged.
            UnsupportedModelError: The tokenizer has no Rust backend, or no token for an answer.
            ValueError: The instruction or the window does not fit the prompt.
        """
        # The tokenizer is loaded first, so that memory that loading it takes for a moment is free for the weights.
        before = resident_memory()
        template = load_template(
            self.directory,
            self.window,
            prompt=self.prompt,
            instruction=self.settings.instruction,
            asks=self.stored.family.asks,
            long_documents=self.settings.long_documents,
            rows=self.stored.vocabulary,
        )
        plan = _with_tokenizer(self.plan, before)
        doubt = self.doubt if recounts else None
        model = self.stored.load(plan, template.answers, self.packing, lossless=doubt is not None)
        for note in model.notes:
            _log.info("model %s: %s", self.directory, note)
        lossless = model.lossless()
        recount = None if doubt is None or lossless is None else Recount(lossless, doubt)
        return Scorer(model, template, plan, recount)

    def close(self) -> None:
        """Close the files. A model that was loaded from them can then read no more weights."""
        self.stored.close()


@dataclass(frozen=True)
class LoadedLanguageModel:
    """This class holds a loaded language model and its tokenizer.

    Attributes:
        model: The model.
        tokenizer: The tokenizer, which makes tokens of prompts and text of tokens.
        end_tokens: The tokens that end a text.
        plan: The plan of the memory budget; None without a budget.
    """

    model: CausalLM
    tokenizer: PromptTokenizer
    end_tokens: frozenset[int]
    plan: MemoryPlan | None


@dataclass(frozen=True)
class OpenLanguageModel:
    """This class knows everything about a language model but its weights.

    Attributes:
        stored: The model's files.
        window: The most tokens of a prompt together with its continuation.
        plan: The plan of the memory budget; None without a budget.
    """

    stored: StoredCausalLM
    window: int
    plan: MemoryPlan | None

    def load(self) -> LoadedLanguageModel:
        """Read tokenizer and weights.

        Raises:
            ModelNotFoundError: The files are damaged.
            UnsupportedModelError: The tokenizer has no Rust backend.
            FileError: The file with the columns of the MLPs is damaged, or belongs to other weights.
            StorageError: The file with the columns cannot be written.
        """
        before = resident_memory()
        tokenizer = PromptTokenizer(self.stored.directory, rows=self.stored.vocabulary)
        plan = _with_tokenizer(self.plan, before)
        ends = self.stored.end_tokens | tokenizer.end_tokens
        return LoadedLanguageModel(self.stored.load(plan), tokenizer, ends, plan)

    def close(self) -> None:
        """Close the files. A model that was loaded from them can then read no more weights."""
        self.stored.close()


def open_reranker(settings: RerankSettings) -> OpenReranker:
    """Find a reranker and read everything but its weights.

    Args:
        settings: The reranker's settings.

    Raises:
        ModelNotFoundError: The name leads to no usable weights.
        UnsupportedModelError: grating does not run weights of this kind, or not within a budget.
        BudgetError: The memory budget is too small; the message states the smallest that works.
        ValueError: A setting does not fit this machine or this model.
    """
    device, products, directory, adapter = _find(settings)
    dtype = states_dtype(products, device)
    stored: StoredReranker
    if is_gguf(directory):
        stored = GgufModel(directory, device=device, dtype=dtype, adapter=adapter)
    else:
        stored = StoredCrossEncoder(
            directory,
            device=device,
            dtype=dtype,
            adapter=adapter,
            lasting=settings.budget is not None,
        )
    with closed_on_error(stored):
        prompt = find_prompt(settings.template, str(settings.model), directory, stored.family)
        usual = usual_length(prompt, stored.family)
        window = find_window(directory, stored.window, settings.max_length, usual)
        opened = OpenReranker(settings, stored, prompt, window)
        _ = opened.plan  # a budget that is too small is refused here
        return opened


def load_unpruned(settings: RerankSettings, dtype: str) -> Scorer:
    """Load the model of some settings again, in another dtype; see :func:`open_reranker`."""
    opened = open_reranker(replace(settings, dtype=dtype, pruning="off", lens=None, recalibrate=0.0))
    with closed_on_error(opened):
        return opened.load(recounts=False)


def open_language_model(settings: GenerationSettings) -> OpenLanguageModel:
    """Find a language model and read everything but its weights.

    Args:
        settings: The model's settings.

    Raises:
        ModelNotFoundError: The name leads to no usable weights.
        UnsupportedModelError: grating does not generate with weights of this kind.
        BudgetError: The memory budget is too small; the message states the smallest that works.
        ValueError: A setting does not fit this machine or this model.
    """
    device, dtype, directory, adapter = _find(settings)
    if is_gguf(directory):
        raise UnsupportedModelError(
            f"model={settings.model!r} is a GGUF file, but generating needs safetensors. Convert the file: "
            f"AutoModelForCausalLM.from_pretrained({str(directory.parent)!r}, "
            f"gguf_file={directory.name!r}).save_pretrained(DIRECTORY), and the AutoTokenizer likewise"
        )
    stored = StoredCausalLM(
        directory,
        device=device,
        dtype=dtype,
        adapter=adapter,
        lasting=settings.budget is not None,
        pruning=mlp_pruning(settings.mlp_density, show_progress=settings.show_progress),
    )
    with closed_on_error(stored):
        window = find_window(directory, stored.window, settings.max_length, _USUAL_LENGTH)
        plan = None if settings.budget is None else stored.plan(window, settings.budget)
        return OpenLanguageModel(stored, window, plan)


def _find(settings: ModelSettings) -> tuple[torch.device, torch.dtype, Path, Adapter | None]:
    """Choose device and dtype, find the files of a model, and read its adapter if there is one."""
    device = choose_device(settings.device)
    dtype, _ = choose_dtype(settings.dtype, device)
    hub = Hub(settings.revision, settings.token, settings.cache_dir, settings.local_files_only)
    directory = find_model(str(settings.model), hub=hub, show_progress=settings.show_progress)
    adapter = None
    if settings.adapter is not None:
        adapter = find_adapter(str(settings.adapter), hub=hub, show_progress=settings.show_progress)
    return device, dtype, directory, adapter


def _with_tokenizer(plan: MemoryPlan | None, before: int) -> MemoryPlan | None:
    """Write the tokenizer's bytes into a plan: the growth of the process above ``before`` bytes."""
    return plan and replace(plan, tokenizer=max(0, resident_memory() - before))
