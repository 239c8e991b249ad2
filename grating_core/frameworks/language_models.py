"""The adapters' language models have these fields; here they are loaded, shared, and told how to answer."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, PrivateAttr, SecretStr, create_model, model_validator

from grating_core.forking import run_in_thread
from grating_core.frameworks.fields import ModelFields, field_of, fields_of
from grating_core.generation import StreamedCausalLM
from grating_core.results import Generation
from grating_core.settings import AnswerSettings, GenerationSettings

# The fields that say how to answer, and the names that the core has for them.
_ANSWER = {one.name.replace("max_new_tokens", "max_tokens"): one.name for one in fields(AnswerSettings)}

if TYPE_CHECKING:
    # As in rerankers.py.
    class _Fields(ModelFields, GenerationSettings):  # type: ignore[misc]
        model: str
        token: str | SecretStr | bool | None = None  # type: ignore[assignment]
        show_progress: bool = Field(init=False)
else:
    _Fields = create_model("_Fields", __base__=ModelFields, **fields_of(GenerationSettings))


class LanguageModelFields(_Fields):  # type: ignore[misc]
    """These are the settings of a language model and of its answers. It is loaded on first use, and shared."""

    max_tokens: int = field_of(AnswerSettings, "max_new_tokens", ge=1)
    temperature: float = field_of(AnswerSettings, "temperature")
    top_p: float = field_of(AnswerSettings, "top_p")
    seed: int | None = field_of(AnswerSettings, "seed")
    stop: list[str] | None = field_of(AnswerSettings, "stop", None)

    _held: StreamedCausalLM | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _check_settings(self) -> Self:
        self._settings(GenerationSettings)
        self._answer({})
        return self

    @property
    def llm(self) -> StreamedCausalLM:
        """The language model of these settings, loaded if nobody has done so yet."""
        self._held = StreamedCausalLM.open_shared(self._settings(GenerationSettings))
        return self._held

    async def _allm(self) -> StreamedCausalLM:
        return await run_in_thread(lambda: self.llm)  # it may have to be loaded

    def _answer(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of an answer, as :meth:`StreamedCausalLM.generate` takes them.

        Args:
            given: Those given with the request, by the names of the fields. None means that the field counts.

        Raises:
            ValueError: One is none of them, or cannot be used; the message names it.
        """
        if unknown := given.keys() - _ANSWER.keys():
            raise ValueError(
                f"{', '.join(sorted(unknown))} cannot be given with a request: it takes {', '.join(_ANSWER)}"
            )
        said = {name: value for name, value in given.items() if value is not None}
        wanted = {known: said.get(name, getattr(self, name)) for name, known in _ANSWER.items()}
        return vars(AnswerSettings(**{**wanted, "stop": wanted["stop"] or ()}))


def pieces(stream: Generator[str, None, Generation]) -> Iterator[str | Generation]:
    """Yield the pieces of a text, and at last what is known of it."""
    yield (yield from stream)
