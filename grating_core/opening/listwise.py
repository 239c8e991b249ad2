"""A listwise reranker is opened to be computed by grating's own layers, without pruning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from grating_core.engine.listwise import ListScorer
from grating_core.lens.probability import Probability, between_0_and_1
from grating_core.lifetime import closed_on_error
from grating_core.memory.meter import resident_memory
from grating_core.models.cross_encoder import StoredCrossEncoder
from grating_core.models.directory import is_gguf, read_stated
from grating_core.models.families import FAMILIES
from grating_core.models.placement import states_dtype
from grating_core.opening.found import Found, with_tokenizer
from grating_core.opening.layered import OpenLayered
from grating_core.opening.opened import refuse_settings
from grating_core.pruning import Off
from grating_core.settings import RerankSettings
from grating_core.text.lists import load_list_template
from grating_core.text.windows import find_window


@dataclass(frozen=True)
class OpenListwise(OpenLayered):
    """This class knows everything about a listwise reranker but its weights. It has no lens."""

    stored: StoredCrossEncoder
    lens = None

    @property
    def _usual_probability(self) -> Probability:
        return between_0_and_1

    def pruning(self) -> Off:
        """See :meth:`OpenReranker.pruning`."""
        return Off()

    def load(self, *, recounts: bool = True) -> ListScorer:  # type: ignore[override]
        """Read tokenizer and weights; see :meth:`OpenReranker.load`."""
        before = resident_memory()
        template = load_list_template(
            self.directory, self.window, instruction=self.settings.instruction, rows=self.stored.vocabulary
        )
        plan = with_tokenizer(self.plan, before)
        model = self.stored.load(plan, packing=self.packing)
        self.tell(model.notes)
        return ListScorer(model, template, plan)


def reads_lists(directory: Path) -> bool:
    """Tell whether a model reads all documents of a request together.

    Args:
        directory: The model directory, or a GGUF file.

    Raises:
        ModelNotFoundError: There is no readable ``config.json``.
    """
    if is_gguf(directory):
        return False
    return any(name in FAMILIES and FAMILIES[name].listwise for name in read_stated(directory)["architectures"])


def open_listwise(settings: RerankSettings, found: Found) -> OpenListwise:
    """Read everything about a listwise reranker but its weights; see ``open_layered``.

    Args:
        settings: The reranker's settings.
        found: What was found for them.

    Raises:
        ModelNotFoundError: The files are no usable weights.
        UnsupportedModelError: grating does not run weights of this kind.
        BudgetError: The memory budget is too small; the message states the smallest that works.
        ValueError: A setting does not fit this model.
    """
    needs = {
        "template": (settings.template is not None, "has a format of its own"),
        "long_documents": (settings.long_documents != "truncate", "cuts documents after 2,048 tokens"),
        "cutoff_layers": (settings.cutoff_layers is not None, "has a head behind its last layer only"),
        "lens": (settings.lens is not None, "shows no document's score between layers"),
    }
    refuse_settings(settings, "it reads all documents of a request together, and", needs)
    device, products, directory, adapter = found
    stored = StoredCrossEncoder(
        directory,
        device=device,
        dtype=states_dtype(products, device),
        adapter=adapter,
        lasting=settings.budget is not None,
    )
    with closed_on_error(stored):
        opened = OpenListwise(settings, stored, None, find_window(directory, stored.window, settings.max_length))
        _ = opened.plan  # a budget that is too small is refused here
        return opened
