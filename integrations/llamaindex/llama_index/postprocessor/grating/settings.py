"""The fields that say which reranker to use, its loading, and what becomes of it in dumps."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal, Self

from llama_index.core.bridge.pydantic import (
    ConfigDict,
    Field,
    field_serializer,
    model_validator,
)
from llama_index.core.postprocessor.types import BaseNodePostprocessor

from grating_core import ClusterPolicy, Prompt, PruningPolicy, Reranker
from grating_core.frameworks.fields import ModelFields
from grating_core.pruning import Off

_SETTINGS = (
    "model", "device", "dtype", "memory_budget", "max_length", "long_documents", "template", "instruction",
    "adapter", "pruning", "target", "guarantee", "lens", "recalibrate", "revision", "token",
    "cache_dir", "local_files_only",
)  # fmt: skip


class RerankerSettings(ModelFields, BaseNodePostprocessor):
    """Settings of a reranker, which is loaded on construction and shared with whoever uses the same ones.

    They are fixed from then on; ``model_copy(update={…})`` makes another object with other settings. Copies share
    the reranker. ``to_dict``, ``to_json`` and pickle keep the settings, from which the same one is made again.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", validate_assignment=True)
    # A permission that nothing needs: code that comes with a model is never run.
    ignored_arguments = ("trust_remote_code",)
    never_pickled = ("token", "callback_manager")  # those who listen are in this process

    model: str = Field(
        default="cross-encoder/ms-marco-MiniLM-L12-v2",
        description="Hub id, local directory, or 'bundled:ms-marco-minilm-l12'.",
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
    pruning: str | ClusterPolicy | PruningPolicy = Field(
        default="auto", description="'auto', 'cluster', 'off', or a policy object."
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
        description="A ready Reranker, instead of all settings of the model.",
    )

    @model_validator(mode="after")
    def _load(self) -> Self:
        # By __dict__, so that it does not count as given.
        if "reranker" not in self.model_fields_set:
            self.__dict__["reranker"] = Reranker.shared(**self._of_model(_SETTINGS))
        elif clash := [name for name in _SETTINGS if name in self.model_fields_set]:
            raise ValueError(f"reranker is given and brings its own {', '.join(clash)}: leave those out")
        else:
            self.__dict__["model"] = str(self.reranker.model_path)
        return self

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """The settings, as JSON can hold them, for :meth:`from_dict`.

        Args:
            kwargs: As pydantic's ``model_dump`` takes them.

        Raises:
            ValueError: A ready ``Reranker``, or a policy object of your own, is in it.
        """
        if "reranker" in self.model_fields_set:
            raise ValueError(
                "reranker was given ready-made, and how it was made is not known: give its model and settings "
                "instead, then they can be written"
            )
        data = super().to_dict(**kwargs)
        if not isinstance(policy := data.get("pruning", "auto"), str | dict):
            raise ValueError(
                f"pruning={policy!r} is an object of your own: write the rest with to_dict(exclude={{'pruning'}}) "
                f"and read it with from_dict(data, pruning=...)"
            )
        return data

    @field_serializer("pruning")
    def _write_policy(self, pruning: str | PruningPolicy) -> Any:
        if type(pruning) is ClusterPolicy:
            return asdict(pruning)
        return "off" if type(pruning) is Off else pruning

    def __setattr__(self, name: str, value: Any) -> None:
        if name in (*_SETTINGS, "reranker"):
            raise AttributeError(
                f"{name} is fixed, since the model has been loaded with it: "
                f"model_copy(update={{{name!r}: {'…' if name == 'token' else repr(value)}}}) makes another "
                f"{type(self).__name__}"
            )
        super().__setattr__(name, value)
