"""The fields that say which reranker to use, its loading, and what becomes of it in dumps."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal, Self

from langchain_core.load.serializable import Serializable
from pydantic import (
    AliasChoices,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_serializer,
    model_serializer,
    model_validator,
)
from typing_extensions import override

from grating_core import ClusterPolicy, Prompt, PruningPolicy, Reranker
from grating_core.frameworks.fields import ModelFields
from grating_core.pruning import Off


class RerankerSettings(ModelFields, Serializable):
    """Settings of a reranker, which is loaded on construction and shared with whoever uses the same ones.

    They are fixed from then on; ``model_copy(update={…})`` makes another object with other settings. Copies share
    the reranker. ``model_dump``, ``model_dump_json``, LangChain's ``dumpd`` and pickle keep the settings, from
    which the same reranker is made again.
    """

    model_config = ConfigDict(
        arbitrary_types_allowed=True, extra="forbid", ser_json_inf_nan="strings", validate_assignment=True
    )

    model: str = Field(
        default="cross-encoder/ms-marco-MiniLM-L12-v2",
        validation_alias=AliasChoices("model", "model_name"),
        description="Hub id, local directory, or 'bundled:ms-marco-minilm-l12'. Instead of a name, another "
        "cross-encoder: its name and settings are taken over.",
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

    @classmethod
    @override
    def _taken_over(cls, given: dict[str, Any]) -> dict[str, Any]:
        model = given.get("model")
        if isinstance(model, RerankerSettings):
            names = model.model_fields_set & RerankerSettings.model_fields.keys()
            taken = {name: getattr(model, name) for name in names}
        elif isinstance(name := getattr(model, "model_name", None), str):  # as of a HuggingFaceCrossEncoder
            taken = {"model": name, "model_kwargs": getattr(model, "model_kwargs", None)}
        else:
            return given
        return taken | {name: value for name, value in given.items() if name != "model"}

    @model_validator(mode="after")
    def _load(self) -> Self:
        """Find the reranker of these settings."""
        settings = [name for name in RerankerSettings.model_fields if name != "reranker"]
        # By __dict__, so that it does not count as given.
        if "reranker" not in self.model_fields_set:
            self.__dict__["reranker"] = Reranker.shared(**self._of_model(settings))
        elif clash := [name for name in settings if name in self.model_fields_set]:
            raise ValueError(f"reranker is given and brings its own {', '.join(clash)}: leave those out")
        else:
            self.__dict__["model"] = str(self.reranker.model_path)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name in RerankerSettings.model_fields:
            raise AttributeError(
                f"{name} is fixed, since the model has been loaded with it: "
                f"model_copy(update={{{name!r}: {'…' if name == 'token' else repr(value)}}}) makes another "
                f"{type(self).__name__}"
            )
        super().__setattr__(name, value)

    @model_serializer(mode="wrap")
    def _dump(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        if "reranker" in self.model_fields_set:
            raise ValueError(
                "reranker was given ready-made, and how it was made is not known: give its model and settings "
                "instead, then they can be dumped"
            )
        dumped: dict[str, Any] = write(self)
        return dumped

    @field_serializer("pruning", when_used="json")
    def _write_policy(self, pruning: str | PruningPolicy) -> str | dict[str, Any]:
        if isinstance(pruning, str):
            return pruning
        if isinstance(pruning, Off):
            return "off"
        if isinstance(pruning, ClusterPolicy):
            return asdict(pruning)
        raise ValueError(
            f"pruning={pruning!r} cannot be written as JSON: use 'auto', 'cluster', 'off' or a ClusterPolicy, "
            f"or leave it out with exclude={{'pruning'}}"
        )

    @classmethod
    @override
    def is_lc_serializable(cls) -> bool:
        return True

    @property
    @override
    def lc_secrets(self) -> dict[str, str]:
        return {"token": "HF_TOKEN"}

    @property
    @override
    def lc_attributes(self) -> dict[str, Any]:
        return self.model_dump(mode="json")
