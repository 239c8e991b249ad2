"""The fields that say which reranker to use, and its loading."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Self

from grating_core import Prompt, PruningPolicy, Reranker


class RerankerSettings(BaseModel):
    """Settings of a reranker, which is loaded on construction and shared with whoever uses the same ones."""

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    model: str = Field(
        default="cross-encoder/ms-marco-MiniLM-L12-v2",
        description="Hub id, local directory, or 'bundled:ms-marco-minilm-l12'.",
    )
    device: str | None = Field(
        default=None, description="'cpu', 'cuda' or 'mps'; None takes the best that is there."
    )
    dtype: str = Field(
        default="auto",
        description="'float32', 'bfloat16', 'float16', or 'auto': bfloat16 where the device is made for it.",
    )
    memory_budget: str | int | None = Field(
        default=None,
        description="How much memory it may take, in bytes or such as '300MB'; None keeps everything resident.",
    )
    max_length: int | None = Field(
        default=None,
        description="Most tokens of a query and document together; None for what the model was made for.",
    )
    long_documents: Literal["truncate", "windows"] = Field(
        default="truncate",
        description="What to do with a document that does not fit: cut its end, or take its best window.",
    )
    template: Prompt | str | None = Field(
        default=None,
        description="How a decoder is asked: a Prompt, the name of an official one, or None for the model's own.",
    )
    instruction: str | None = Field(
        default=None, description="What to judge by, for models that take an instruction."
    )
    adapter: str | None = Field(
        default=None, description="LoRA adapter, a directory or hub id, that is merged into the weights."
    )
    pruning: str | PruningPolicy = Field(
        default="auto",
        description="'auto', 'cluster', 'off', or a policy object. Never applies to GratingCrossEncoder.score.",
    )
    target: float = Field(
        default=0.98,
        description="Share of the full model's top K that a lens, or recalibration, is to keep on average.",
    )
    guarantee: Literal["share", "set"] = Field(
        default="share", description="'set': the target is the probability that the whole top K is kept."
    )
    lens: str | None = Field(
        default=None,
        description="Directory with the lens to prune by; None for the one that belongs to the model.",
    )
    recalibrate: float = Field(
        default=0.0,
        description="Share of requests that are computed again when idle, so that pruning stays at the target.",
    )
    reranker: Reranker = Field(
        default=None,  # type: ignore[assignment]  # only until _load has run
        exclude=True,
        repr=False,
        description="A ready Reranker, instead of all settings above.",
    )

    @model_validator(mode="after")
    def _load(self) -> Self:
        settings = [name for name in RerankerSettings.model_fields if name != "reranker"]
        if "reranker" not in self.model_fields_set:
            self.reranker = Reranker.shared(**{name: getattr(self, name) for name in settings})
        elif clash := [name for name in settings if name in self.model_fields_set]:
            raise ValueError(f"reranker is given and brings its own {', '.join(clash)}: leave those out")
        else:
            self.model = str(self.reranker.model_path)
        return self
