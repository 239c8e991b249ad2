"""A reranker is opened to be computed by grating's own layers, which prune, stream and pack to 8 bits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from grating_core.engine.recount import Recount
from grating_core.engine.scorer import LayerScorer
from grating_core.errors import StorageError
from grating_core.files.places import expanded
from grating_core.kernels.choice import kernels
from grating_core.lens.pruning import ByLens
from grating_core.lens.store import CalibratedLens, find_lens, open_lens, warn_once
from grating_core.lifetime import closed_on_error
from grating_core.memory.meter import resident_memory
from grating_core.memory.plan import MemoryPlan
from grating_core.models.cross_encoder import StoredCrossEncoder
from grating_core.models.packing import IN_8_BITS, Packing
from grating_core.models.placement import states_dtype
from grating_core.opening.found import Found, find, with_tokenizer
from grating_core.opening.opened import OpenReranker
from grating_core.pruning import ClusterPolicy, Off, PruningPolicy
from grating_core.settings import RerankSettings
from grating_core.text.pairs import load_template
from grating_core.text.prompts import find_prompt, usual_length
from grating_core.text.windows import find_window


@dataclass(frozen=True)
class OpenLayered(OpenReranker):
    """This class knows everything about a reranker that grating's own layers compute, but its weights."""

    stored: StoredCrossEncoder

    @property
    def architecture(self) -> str:
        """See :attr:`OpenReranker.architecture`."""
        return self.stored.family.architecture

    @property
    def products(self) -> torch.dtype:
        """See :attr:`OpenReranker.products`."""
        return self.stored.dtype if self.packing is None else torch.int8

    @cached_property
    def lens(self) -> CalibratedLens | None:
        """See :attr:`OpenReranker.lens`."""
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
        packing = Packing(self.stored.dtype, IN_8_BITS)
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
        """See :attr:`OpenReranker.plan`."""
        budget = self.settings.budget
        return None if budget is None else self.stored.plan(self.window, budget, self.packing)

    def pruning(self) -> PruningPolicy | ByLens:
        """See :meth:`OpenReranker.pruning`."""
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

    def load(self, *, recounts: bool = True) -> LayerScorer:
        """Read tokenizer and weights; see :meth:`OpenReranker.load`.

        Args:
            recounts: Whether a model in 8 bits may keep the layers without 8 bits as well, to recount what is in
                doubt.
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
        plan = with_tokenizer(self.plan, before)
        doubt = self.doubt if recounts else None
        model = self.stored.load(
            plan,
            template.answers,
            self.packing,
            lossless=doubt is not None,
            temperature=template.temperature,
        )
        self.tell(model.notes)
        lossless = model.lossless()
        recount = None if doubt is None or lossless is None else Recount(lossless, doubt)
        return LayerScorer(model, template, plan, recount)


def open_layered(settings: RerankSettings, found: Found) -> OpenLayered:
    """Read everything about a reranker but its weights.

    Args:
        settings: The reranker's settings.
        found: What was found for them.

    Raises:
        ModelNotFoundError: The files are no usable weights.
        UnsupportedModelError: grating does not run weights of this kind, or not within a budget.
        BudgetError: The memory budget is too small; the message states the smallest that works.
        ValueError: A setting does not fit this model.
    """
    device, products, directory, adapter = found
    dtype = states_dtype(products, device)
    stored = StoredCrossEncoder(
        directory,
        device=device,
        dtype=dtype,
        adapter=adapter,
        cutoff_layers=settings.cutoff_layers,
        lasting=settings.budget is not None,
    )
    with closed_on_error(stored):
        prompt = find_prompt(settings.template, str(settings.model), directory, stored.family)
        usual = usual_length(prompt, stored.family)
        window = find_window(directory, stored.window, settings.max_length, usual)
        opened = OpenLayered(settings, stored, prompt, window)
        _ = opened.plan  # a budget that is too small is refused here
        return opened


def load_unpruned(settings: RerankSettings, dtype: str) -> LayerScorer:
    """Load the model of some settings again, in another dtype; see :func:`open_layered`."""
    plain = replace(settings, dtype=dtype, pruning="off", lens=None, recalibrate=0.0)
    opened = open_layered(plain, find(plain))
    with closed_on_error(opened):
        return opened.load(recounts=False)
