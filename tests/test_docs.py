"""What the documentation says is so: its examples run, and its tables are complete."""

import inspect
import re
import shlex
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import langchain_grating
import llama_index.postprocessor.grating as llama_index_grating
import pytest
from langchain_core.language_models import BaseChatModel
from langchain_grating.settings import RerankerSettings as LangChainSettings
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.llms import CustomLLM
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.llms.grating import GratingLLM
from llama_index.postprocessor.grating.settings import RerankerSettings as LlamaIndexSettings
from pydantic import BaseModel
from typer.main import get_command

import grating_core
from grating_core import Reranker, StreamedCausalLM, errors, select_context
from grating_core.cli.commands import app
from grating_core.lab.distill import distill
from grating_core.models.families import FAMILIES
from grating_core.text.prompts import PROMPTS

DOCS = Path(__file__).parent.parent / "docs"
CORE = Path(grating_core.__file__).parent
PAGES = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]
EXAMPLE = re.compile(r"^( *)```python.*\n((?:.*\n)*?)\1```$", re.MULTILINE)
EXAMPLES = {
    path.stem: [textwrap.dedent(found[2]) for found in EXAMPLE.finditer(path.read_text(encoding="utf-8"))]
    for path in sorted(DOCS.glob("*.md"))
}

Settings = Mapping[str, Any]  # defaults by name; inspect.Parameter.empty where there is none


@pytest.fixture
def own_event_handlers() -> Iterator[None]:
    """Those that an example adds to LlamaIndex's root would print in the tests that follow."""
    root = get_dispatcher()
    before = list(root.event_handlers)
    yield
    root.event_handlers = before


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the frameworks, about their own insides
@pytest.mark.usefixtures("own_event_handlers")
@pytest.mark.parametrize("page", [page for page, examples in EXAMPLES.items() if examples])
def test_the_examples_of_a_page_run_one_after_the_other(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for example in EXAMPLES[page]:
        exec(compile(example, f"{page}.md", "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_are_understood(page: Path) -> None:
    blocks = "\n".join(
        re.findall(r"^```(?:bash|console)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    )
    for line in re.findall(r"^(?:\$ )?grating ([^|>\n]+)", blocks, re.MULTILINE):
        command, words = get_command(app), shlex.split(line, comments=True)
        while words and words[0] in getattr(command, "commands", ()):
            command = command.commands[words.pop(0)]  # type: ignore[attr-defined]
        command.make_context(line, words)  # refuses what it does not know


def arguments(function: Any, *data: str) -> Settings:
    """The defaults of a function's arguments, but those that are what it works on."""
    parameters = inspect.signature(function).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name not in ("self", *data)}


def fields(model: Any, base: Any = BaseModel) -> Settings:
    """The defaults of a pydantic model's fields, but those that its base has as well."""
    return {
        # A ready reranker is not given with None: that only says that there is none yet.
        name: inspect.Parameter.empty if field.is_required() or field.annotation is Reranker else field.default
        for name, field in model.model_fields.items()
        if name not in base.model_fields
    }


def options(command: str) -> Settings:
    """The defaults of a command's options, by their long names."""
    parameters = get_command(app).commands[command].params  # type: ignore[attr-defined]
    return {
        parameter.opts[0]: inspect.Parameter.empty if parameter.required else parameter.default
        for parameter in parameters
    }


def option(setting: str) -> str:
    return "--" + setting.replace("_", "-")


RERANKING = {
    "setting": {**arguments(Reranker.from_pretrained), **arguments(Reranker.rerank, "query", "documents")},
    "LangChain": fields(langchain_grating.GratingRerank),
    "LlamaIndex": fields(llama_index_grating.GratingRerank, BaseNodePostprocessor),
    "command": options("rerank"),
}
CALIBRATING = {"setting": arguments(Reranker.calibrate), "command": options("calibrate")}
DISTILLING = {"setting": arguments(distill), "command": options("distill")}
SELECTING = {
    "setting": arguments(select_context, "query", "text_or_documents", "reranker"),
    "LangChain": fields(langchain_grating.GratingContextSelector, LangChainSettings),
    "LlamaIndex": fields(llama_index_grating.GratingContextSelector, LlamaIndexSettings),
    "command": options("select"),
}
GENERATING = {
    "setting": {**arguments(StreamedCausalLM.from_pretrained), **arguments(StreamedCausalLM.generate, "prompt")},
    "LangChain": fields(langchain_grating.ChatGrating, BaseChatModel),
    "LlamaIndex": fields(GratingLLM, CustomLLM),
    "command": options("generate"),
}
SIMULATING = {"setting": options("simulate")}
STORING = {"setting": arguments(langchain_grating.GratingStore)}
TABLES = {
    "Reranking": RERANKING,
    "Selecting context": SELECTING,
    "Generating": GENERATING,
    "Agent memory": STORING,
    "Calibrating": CALIBRATING,
    "Simulating": SIMULATING,
    "Distilling": DISTILLING,
}


@pytest.mark.parametrize("title", TABLES)
def test_the_table_of_parameters_is_complete(title: str) -> None:
    surfaces = TABLES[title]
    missing = {surface: set(settings) for surface, settings in surfaces.items()}
    if "command" in surfaces:  # its other options say where texts come from, and how results are shown
        missing["command"] &= {option(setting) for setting in surfaces["setting"]}
    for row in rows("parameters.md", title):
        defaults = set()
        for surface, settings in surfaces.items():
            if row[surface] == "–":
                continue
            name = (row["setting"] if row[surface] == "✓" else row[surface]).strip("`")
            if surface == "command" and row[surface] == "✓":
                name = option(name)
            defaults.add(shown(settings[name]))
            missing[surface].discard(name)
        assert set(re.findall("`(.*?)`", row["default"])) == defaults - {""}, row
    assert not any(missing.values())


def rows(page: str, title: str) -> Iterator[dict[str, str]]:
    """The rows of the first table under a heading."""
    section = (DOCS / page).read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0]
    header, _, *body = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("|")
    ]
    return (dict(zip(header, row, strict=True)) for row in body)


def shown(default: object) -> str:
    """A default as the tables write it."""
    if default is inspect.Parameter.empty:
        return ""
    default = getattr(default, "value", default)  # of an enumeration
    return f'"{default}"' if isinstance(default, str) else str(default)


@pytest.mark.parametrize(
    ("page", "names"),
    [
        (
            "../CONTRIBUTING.md",
            [f"    {room.stem}" for room in CORE.iterdir() if room.suffix in ("", ".py") and room.stem[0] != "_"],
        ),
        ("troubleshooting.md", [name for name, _ in inspect.getmembers(errors, inspect.isclass)]),
        ("models.md", FAMILIES),
        ("models.md", PROMPTS),
        ("api.md", [f"::: grating_core.{name}" for name in grating_core.__all__]),
        ("api.md", [f"::: langchain_grating.{name}" for name in langchain_grating.__all__]),
        ("api.md", [f"::: llama_index.postprocessor.grating.{name}" for name in llama_index_grating.__all__]),
    ],
)
def test_nothing_is_left_out(page: str, names: Iterable[str]) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    assert [name for name in names if not re.search(rf"{re.escape(name)}\b", text)] == []
