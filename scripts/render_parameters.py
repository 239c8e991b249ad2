"""Writes the tables of docs/parameters.md from the code: names, defaults and descriptions of all settings.

    python scripts/render_parameters.py

A table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->``. A test holds the page to the code.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import griffe
import langchain_grating
import llama_index.postprocessor.grating as llama_index_grating
from langchain_core.language_models import BaseChatModel
from langchain_grating.settings import RerankerSettings as LangChainSettings
from llama_index.core.llms import CustomLLM
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.llms.grating import GratingLLM
from llama_index.postprocessor.grating.settings import RerankerSettings as LlamaIndexSettings
from pydantic import BaseModel
from typer.main import get_command

from grating_core import Reranker, select_context
from grating_core.cli.commands import app
from grating_core.lab.distill import distill
from grating_core.serving.settings import ServeSettings
from grating_core.settings import AnswerSettings, GenerationSettings, RerankSettings

PAGE = Path(__file__).parent.parent / "docs" / "parameters.md"
REQUIRED = inspect.Parameter.empty

_TABLE = re.compile(r"(?<=<!-- table: )([\w ]+)( -->\n).*?(?=<!-- end of table -->)", re.DOTALL)
_RENAMED = {
    "LangChain": {"top_k": "top_n", "max_new_tokens": "max_tokens"},
    "LlamaIndex": {"top_k": "top_n", "max_new_tokens": "max_tokens"},
    "the command": {"documents": "--corpus", "texts": "--text"},
}


@dataclass(frozen=True)
class Setting:
    """A setting as one surface has it; a default of ``REQUIRED`` means that it has none."""

    default: object
    about: str


Settings = Mapping[str, Setting]


def of_class(settings: type, *, basic: bool | None = None) -> Settings:
    """Return the settings of a class: those that a beginner sees, the others, or all."""
    return {
        field.name: Setting(REQUIRED if field.default is MISSING else field.default, field.metadata["about"])
        for field in fields(settings)
        if basic in (None, field.metadata["basic"])
    }


def of_function(function: Callable[..., Any], *data: str) -> Settings:
    """Return a function's arguments with their descriptions, except those that are data."""
    sections = griffe.Docstring(inspect.getdoc(function) or "").parse("google", warnings=False)
    described = [section for section in sections if isinstance(section, griffe.DocstringSectionParameters)]
    about = {argument.name: argument.description for section in described for argument in section.value}
    return {
        name: Setting(parameter.default, about[name])
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in ("self", *data)
    }


def of_fields(model: type[BaseModel], base: type[BaseModel] = BaseModel) -> Settings:
    """Return the fields of an adapter's class, except those that its base has."""
    return {
        name: Setting(
            REQUIRED if field.is_required() else field.default,
            field.description or "",
        )
        for name, field in model.model_fields.items()
        if name not in base.model_fields
    }


def of_command(name: str) -> Settings:
    """Return a command's arguments and options, by their long names."""
    parameters = get_command(app).commands[name].params  # type: ignore[attr-defined]
    return {one.opts[0]: Setting(REQUIRED if one.required else one.default, one.help or "") for one in parameters}


def table(core: Settings, surfaces: Mapping[str, Settings] | None = None, own: Collection[str] = ()) -> str:
    """Return a table of the core's settings.

    Args:
        core: The settings, by name.
        surfaces: The same settings elsewhere, by the name of the surface.
        own: Names of settings that only other surfaces have, which follow.
    """
    everywhere = {"the core": core, **(surfaces or {})}
    rows = [_row(name, everywhere) for name in (*core, *own)]
    header = ["setting", "default", "what it does", "where"][: 4 if any(row[3] for row in rows) else 3]
    lines = [header, ["---"] * len(header), *rows]
    return "".join(
        f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in line[: len(header)])}|\n" for line in lines
    )


def own(surfaces: Mapping[str, Settings], *cores: Settings) -> list[str]:
    """Return the names of the adapters' fields that the core has under no name."""
    known = {called for surface in surfaces for core in cores for name in core for called in _names(surface, name)}
    fields = [name for surface, settings in surfaces.items() if surface != "the command" for name in settings]
    return [name for name in dict.fromkeys(fields) if name not in known]


def _names(surface: str, name: str) -> tuple[str, ...]:
    """Return what a surface may call a setting of the core."""
    return name, f"--{name.replace('_', '-')}", *filter(None, [_RENAMED.get(surface, {}).get(name)])


def _row(name: str, surfaces: Mapping[str, Settings]) -> list[str]:
    found = {
        surface: (called, settings[called])
        for surface, settings in surfaces.items()
        for called in _names(surface, name)
        if called in settings
    }
    defaults = _grouped({surface: _shown(setting.default) for surface, (_, setting) in found.items()})
    (first, _), *others = defaults.items()
    default = "; ".join([first, *(f"{where} {other}" for other, where in others)])
    renamed = {surface: called for surface, (called, _) in found.items() if called not in _names("the core", name)}
    notes = [f"`{called}` in {where}" for called, where in _grouped(renamed).items()]
    missing = [surface for surface in surfaces if surface not in found]
    if missing:
        notes.insert(0, f"not in {_joined(missing)}" if len(missing) == 1 else f"only in {_joined(found)}")
    return [f"`{name}`", default, _plain(next(iter(found.values()))[1].about), "; ".join(notes)]


def _grouped(values: Mapping[str, str]) -> dict[str, str]:
    """Return for each value the surfaces that have it."""
    return {value: _joined(s for s in values if values[s] == value) for value in values.values()}


def _joined(surfaces: Iterable[str]) -> str:
    *others, last = surfaces
    return f"{', '.join(others)} and {last}" if others else last


def _shown(default: object) -> str:
    if default is REQUIRED:
        return "required"
    default = getattr(default, "value", default)  # of an enumeration
    return f'`"{default}"`' if isinstance(default, str) else f"`{default}`"


def _plain(about: str) -> str:
    """Return a description without roles, double backticks and line breaks."""
    text = re.sub(r":\w+:`~?([\w.]+)`", r"`\1`", about).replace("``", "`")
    text = re.sub(r"(?<![\w`])'([^' ]+)'(?![\w`])", r'`"\1"`', text)
    return " ".join(text.split()).replace("|", "\\|")


def tables() -> dict[str, str]:
    """Return all tables, by the names that the page has for them."""
    reranking = {
        "LangChain": of_fields(langchain_grating.GratingRerank),
        "LlamaIndex": of_fields(llama_index_grating.GratingRerank, BaseNodePostprocessor),
        "the command": of_command("rerank"),
    }
    chosen = of_function(select_context, "query", "text_or_documents", "reranker")
    selecting = {
        "LangChain": of_fields(langchain_grating.GratingContextSelector, LangChainSettings),
        "LlamaIndex": of_fields(llama_index_grating.GratingContextSelector, LlamaIndexSettings),
        "the command": of_command("select"),
    }
    generating = {
        "LangChain": of_fields(langchain_grating.ChatGrating, BaseChatModel),
        "LlamaIndex": of_fields(GratingLLM, CustomLLM),
        "the command": of_command("generate"),
    }
    first, more = (of_class(RerankSettings, basic=basic) for basic in (True, False))
    request = of_function(Reranker.rerank, "query", "documents")
    first_of_models, more_of_models = (of_class(GenerationSettings, basic=basic) for basic in (True, False))
    answer = of_class(AnswerSettings)
    return {
        "reranking": table(first, reranking),
        "request": table(request, reranking, own(reranking, first, more, request)),
        "more of reranking": table(more, reranking),
        "selecting": table(chosen, selecting, own(selecting, chosen)),
        "generating": table(first_of_models, generating),
        "answer": table(answer, generating, own(generating, first_of_models, more_of_models, answer)),
        "more of generating": table(more_of_models, generating),
        "memory": table(of_function(langchain_grating.GratingStore.__init__)),
        "serving": table(of_class(ServeSettings)),
        "calibrating": table(of_function(Reranker.calibrate), {"the command": of_command("calibrate")}),
        "simulating": table(of_command("simulate")),
        "distilling": table(of_function(distill), {"the command": of_command("distill")}),
    }


def render(page: str) -> str:
    """Return the page with its tables as the code has them."""
    found = tables()
    return _TABLE.sub(lambda place: f"{place[1]}{place[2]}{found[place[1]]}", page)


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
