"""The fields that say which reranker to use, its loading, and what becomes of it in copies and dumps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from langchain_core.load.serializable import Serializable
from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    SerializerFunctionWrapHandler,
    field_serializer,
    model_serializer,
    model_validator,
)
from typing_extensions import override

from grating_core import ClusterPolicy, Off, Prompt, PruningPolicy, Reranker
from grating_core.frameworks.migration import as_settings


class ModelSettings(BaseModel):
    """Settings of any model. Copies and pickles are made of them, like any object, and find the same model."""

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
    mlp_density: float | None = Field(
        default=None,
        description="Share of the MLPs' weights that a token is computed with, above 0, 1 at most; None for all.",
    )
    adapter: str | None = Field(
        default=None, description="LoRA adapter, a directory or hub id, that is merged into the weights."
    )
    revision: str | None = Field(
        default=None, description="Branch, tag or commit of the model on the hub; None for the newest."
    )
    token: SecretStr | bool | None = Field(
        default=None,
        exclude=True,
        description="What proves to the hub who asks; None for the one of 'hf auth login'. It is not written to "
        "dumps and pickles.",
    )
    cache_dir: str | None = Field(
        default=None, description="Where the hub's files are kept; None for the hub's own place."
    )
    local_files_only: bool = Field(
        default=False, description="Use what is kept there already, without asking the hub."
    )

    ignored_arguments: ClassVar[tuple[str, ...]] = ()
    """Arguments of other libraries' classes that mean nothing here, whatever they say."""

    if not TYPE_CHECKING:  # editors and type checkers are to see the fields

        def __init__(self, **given: Any) -> None:
            settings = as_settings(
                type(self).__name__, self._taken_over(given), _types(type(self)), ignored=self.ignored_arguments
            )
            if isinstance(settings.get("token"), str):  # before an error may quote it
                settings["token"] = SecretStr(settings["token"])
            super().__init__(**settings)

    @classmethod
    def _taken_over(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments, where one is an object with settings of its own these instead."""
        return given

    def _of_model(self, names: Iterable[str]) -> dict[str, Any]:
        """Those of the settings that the model is loaded with, as the core takes them."""
        token = self.token.get_secret_value() if isinstance(self.token, SecretStr) else self.token
        return {name: token if name == "token" else getattr(self, name) for name in names}

    def _given(self) -> dict[str, Any]:
        """The arguments that it was made with, and what has been assigned since."""
        return {name: getattr(self, name) for name in self.model_fields_set}

    @override
    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        return type(self)(**{**self._given(), **(update or {})})

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return self.model_copy()

    def __reduce__(self) -> tuple[partial[Self], tuple[()]]:
        given = self._given()
        given.pop("token", None)  # nobody else is to read it
        return partial(type(self), **given), ()


def _types(cls: type[BaseModel]) -> dict[str, Any]:
    """The types of a class's fields, by all names that they go by."""
    types: dict[str, Any] = {}
    for name, field in cls.model_fields.items():
        alias = field.validation_alias
        for spelling in alias.choices if isinstance(alias, AliasChoices) else [name]:
            types[str(spelling)] = field.annotation
    return types


class RerankerSettings(ModelSettings, Serializable):
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
            taken = model._given()
            taken = {name: taken[name] for name in taken.keys() & RerankerSettings.model_fields}
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
