"""The fields of the adapters' classes are made of the settings. Copies and pickles are made of the fields.

They are pydantic's, which both frameworks bring along. Only :mod:`grating_core.frameworks` imports this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from grating_core.frameworks.migration import as_settings
from grating_core.pruning import ClusterPolicy, PruningPolicy
from grating_core.settings import ModelSettings
from grating_core.text.prompts import Prompt

AnySettings = TypeVar("AnySettings", bound=ModelSettings)

# What the names of types in settings.py mean here: text where JSON has no such value, and a policy that comes back
# from JSON.
_TYPES = {
    "Path": str,
    "torch": SimpleNamespace(device=str, dtype=str),
    "PruningName": str,
    "PruningPolicy": ClusterPolicy | PruningPolicy,
    "Prompt": Prompt,
}


def field_of(settings: type, name: str, *default: Any, **checks: Any) -> Any:
    """Return pydantic's field for a setting, with its default and description; a secret is not dumped.

    Args:
        settings: One of the classes of :mod:`grating_core.settings`.
        name: The name of the setting.
        default: The default, if it is another one here.
        checks: What pydantic is to check, such as ``ge=1``.
    """
    (one,) = (one for one in fields(settings) if one.name == name)
    (value,) = default or (... if one.default is MISSING else one.default,)
    return Field(value, description=one.metadata["about"], exclude=None if one.repr else True, **checks)


def fields_of(settings: type, **defaults: Any) -> dict[str, Any]:
    """Return pydantic's fields for all settings that tell models apart, as ``create_model`` takes them.

    Progress bars, for example, make no other model, so adapters have no field for them.

    Args:
        settings: One of the classes of :mod:`grating_core.settings`.
        defaults: Defaults that are others here, by the names of the settings.
    """
    types = get_type_hints(settings, localns=_TYPES)
    return {
        one.name: (
            types[one.name] if one.repr else SecretStr | bool | None,
            field_of(settings, one.name, *([defaults[one.name]] if one.name in defaults else [])),
        )
        for one in fields(settings)
        if one.compare
    }


class ModelFields(BaseModel):
    """All classes with such fields have this base. Copies and pickles of them find the same model."""

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    ignored_arguments: ClassVar[tuple[str, ...]] = ()
    """These arguments of other libraries' classes mean nothing here, whatever they say."""

    never_pickled: ClassVar[tuple[str, ...]] = ("token",)
    """These fields stay in this process: nobody else is to read a token."""

    if not TYPE_CHECKING:  # editors and type checkers are to see the fields

        def __init__(self, **given: Any) -> None:
            types = {name: field.annotation for name, field in type(self).model_fields.items()}
            settings = as_settings(
                type(self).__name__, self._taken_over(given), types, ignored=self.ignored_arguments
            )
            if isinstance(settings.get("token"), str):  # before an error may quote it
                settings["token"] = SecretStr(settings["token"])
            super().__init__(**settings)

    @classmethod
    def _taken_over(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments; if one is an object with settings of its own, these instead of it."""
        return given

    def _settings(self, kind: type[AnySettings]) -> AnySettings:
        """Return the settings that the fields hold, as the core takes them."""
        found = {one.name: getattr(self, one.name) for one in fields(kind) if one.compare}
        if isinstance(token := found["token"], SecretStr):
            found["token"] = token.get_secret_value()
        return kind(**found)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return another object of this class.

        Args:
            update: The fields that it has instead of this object's.
            deep: This makes no difference: settings are never copied.
        """
        return type(self)(**{**given_to(self), **(update or {})})

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return self.model_copy()

    def __reduce__(self) -> tuple[partial[Self], tuple[()]]:
        given = {name: value for name, value in given_to(self).items() if name not in self.never_pickled}
        return partial(type(self), **given), ()


def given_to(made: ModelFields) -> dict[str, Any]:
    """Return the arguments that an object was made with, and what has been assigned since, by their names."""
    return {name: getattr(made, name) for name in made.model_fields_set}
