"""A reranker in LangChain: its settings, and how LangChain writes them down."""

from __future__ import annotations

from typing import Any

from langchain_core.load.serializable import Serializable
from pydantic import ConfigDict, SerializerFunctionWrapHandler, model_serializer
from typing_extensions import override

from grating_core.frameworks.fields import ModelFields, given_to
from grating_core.frameworks.rerankers import RerankerFields


class Written(ModelFields, Serializable):
    """LangChain's ``dumpd`` writes these fields; for a token it writes only that ``HF_TOKEN`` has it."""

    @classmethod
    @override
    def is_lc_serializable(cls) -> bool:
        return True

    @property
    @override
    def lc_secrets(self) -> dict[str, str]:
        return {"token": "HF_TOKEN"}


class RerankerSettings(RerankerFields, Written):  # type: ignore[misc]
    """These are the settings of a reranker. It is loaded on construction, and shared by all with the same ones.

    They are fixed from then on; ``model_copy(update={…})`` makes another object with other settings. Copies share
    the reranker. ``model_dump``, ``model_dump_json``, LangChain's ``dumpd`` and pickle keep the settings, from
    which the same reranker is made again. Instead of the model's name another cross-encoder may be given, whose
    name and settings are taken over.
    """

    model_config = ConfigDict(extra="forbid")

    @classmethod
    @override
    def _taken_over(cls, given: dict[str, Any]) -> dict[str, Any]:
        model = given.get("model")
        if isinstance(model, RerankerFields):
            taken = {name: value for name, value in given_to(model).items() if name in RerankerFields.model_fields}
        elif isinstance(name := getattr(model, "model_name", None), str):  # as of a HuggingFaceCrossEncoder
            taken = {"model": name, "model_kwargs": getattr(model, "model_kwargs", None)}
        else:
            return given
        return taken | {name: value for name, value in given.items() if name != "model"}

    @model_serializer(mode="wrap")
    def _dump(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        self._refuse_ready()
        dumped: dict[str, Any] = write(self)
        return dumped

    @property
    @override
    def lc_attributes(self) -> dict[str, Any]:
        return self.model_dump(mode="json")
