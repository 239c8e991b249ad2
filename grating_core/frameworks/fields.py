"""The fields of the adapters' classes that say which model to use, and what becomes of them in copies and pickles.

They are pydantic's, which both frameworks bring along. Nothing else in the core imports this module.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import AliasChoices, BaseModel, Field, SecretStr

from grating_core.frameworks.migration import as_settings


class ModelFields(BaseModel):
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

    never_pickled: ClassVar[tuple[str, ...]] = ("token",)
    """Fields that stay in this process: nobody else is to read a token."""

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

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return another object of this class.

        Args:
            update: Fields that it has instead of this object's.
            deep: Makes no difference: settings are never copied.
        """
        return type(self)(**{**self._given(), **(update or {})})

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return self.model_copy()

    def __reduce__(self) -> tuple[partial[Self], tuple[()]]:
        given = {name: value for name, value in self._given().items() if name not in self.never_pickled}
        return partial(type(self), **given), ()


class LanguageModelFields(ModelFields):
    """Settings of any language model."""

    mlp_density: float | None = Field(
        default=None,
        description="Share of the MLPs' weights that a token is computed with, above 0, 1 at most; None for all.",
    )


def _types(cls: type[BaseModel]) -> dict[str, Any]:
    """The types of a class's fields, by all names that they go by."""
    types: dict[str, Any] = {}
    for name, field in cls.model_fields.items():
        alias = field.validation_alias
        for spelling in alias.choices if isinstance(alias, AliasChoices) else [name]:
            types[str(spelling)] = field.annotation
    return types
