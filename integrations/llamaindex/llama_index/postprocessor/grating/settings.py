"""The fields that say which reranker to use, its loading, and what becomes of it in copies and dumps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from llama_index.core.bridge.pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    field_serializer,
    model_validator,
)
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from typing_extensions import override

from grating_core import ClusterPolicy, Off, Prompt, PruningPolicy, Reranker
from grating_core.frameworks.migration import as_settings

_SETTINGS = (
    "model", "device", "dtype", "memory_budget", "max_length", "long_documents", "template", "instruction",
    "adapter", "mlp_density", "pruning", "target", "guarantee", "lens", "recalibrate", "revision", "token",
    "cache_dir", "local_files_only",
)  # fmt: skip


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
            types = {name: field.annotation for name, field in type(self).model_fields.items()}
            settings = as_settings(type(self).__name__, given, types, ignored=self.ignored_arguments)
            if isinstance(settings.get("token"), str):  # before an error may quote it
                settings["token"] = SecretStr(settings["token"])
            super().__init__(**settings)

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
        given.pop("callback_manager", None)  # those who listen are in this process
        given.pop("token", None)  # nobody else is to read it
        return partial(type(self), **given), ()


class RerankerSettings(ModelSettings, BaseNodePostprocessor):
    """Settings of a reranker, which is loaded on construction and shared with whoever uses the same ones.

    They are fixed from then on; ``model_copy(update={…})`` makes another object with other settings. Copies share
    the reranker. ``to_dict``, ``to_json`` and pickle keep the settings, from which the same one is made again.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", validate_assignment=True)
    # A permission that nothing needs: code that comes with a model is never run.
    ignored_arguments = ("trust_remote_code",)

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
