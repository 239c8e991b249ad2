"""What the documentation says is so: its examples run, and its tables are complete."""

import inspect
import re
import shlex
import textwrap
from collections.abc import Iterable, Iterator
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
from grating_core.serving.settings import ServeSettings
from grating_core.text.prompts import PROMPTS
from scripts import render_parameters
from tests.core.serving.conftest import real_model, serving
from tests.test_rooms import ROOMS
from tests.tiny_chat import save_chat_model

DOCS = Path(__file__).parent.parent / "docs"
PAGES = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("clients/*.md"))]
EXAMPLE = re.compile(r"^( *)```python.*\n((?:.*\n)*?)\1```$", re.MULTILINE)
SERVER = "http://127.0.0.1:8080"
LANGUAGE_MODEL = re.compile(r'"(?:Qwen/Qwen3-4B|HuggingFaceTB/SmolLM2-135M-Instruct)"')
EXAMPLES = {
    path.stem: [textwrap.dedent(found[2]) for found in EXAMPLE.finditer(path.read_text(encoding="utf-8"))]
    for path in sorted(DOCS.glob("*.md"))
}


@pytest.fixture
def own_event_handlers() -> Iterator[None]:
    """Those that an example adds to LlamaIndex's root would print in the tests that follow."""
    root = get_dispatcher()
    before = list(root.event_handlers)
    yield
    root.event_handlers = before


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of a language model that takes the place of those of the hub."""
    return str(save_chat_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a server that takes the place of the one on the pages."""
    with serving(real_model(), name="reranker") as address:
        yield address


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the frameworks, about their own insides
@pytest.mark.usefixtures("own_event_handlers")
@pytest.mark.parametrize("page", [page for page, examples in EXAMPLES.items() if examples])
def test_the_examples_of_a_page_run_one_after_the_other(
    page: str, small_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for example in EXAMPLES[page]:
        code = LANGUAGE_MODEL.sub(repr(small_model), example)
        if SERVER in code:
            code = code.replace(SERVER, request.getfixturevalue("server"))
        exec(compile(code, f"{page}.md", "exec"), namespace)


def test_the_recipe_for_an_agents_tools_finds_those_that_the_page_names(
    capsys: pytest.CaptureFixture[str],
) -> None:
    (example,) = EXAMPLES["mcp"]
    exec(example, {})
    first = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert first == ["search_flights", "get_weather", "convert_currency"]


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


def arguments(function: Any, *data: str) -> set[str]:
    """The names of a function's arguments, but those that are what it works on."""
    return set(inspect.signature(function).parameters) - {"self", *data}


def fields(model: Any, base: Any = BaseModel) -> set[str]:
    """The names of a pydantic model's fields, but those that its base has as well."""
    return set(model.model_fields) - set(base.model_fields)


SETTINGS = {
    "Reranking": arguments(Reranker.from_pretrained)
    | arguments(Reranker.rerank, "query", "documents")
    | fields(langchain_grating.GratingRerank)
    | fields(llama_index_grating.GratingRerank, BaseNodePostprocessor),
    "Selecting context": arguments(select_context, "query", "text_or_documents", "reranker")
    | fields(langchain_grating.GratingContextSelector, LangChainSettings)
    | fields(llama_index_grating.GratingContextSelector, LlamaIndexSettings),
    "Generating": arguments(StreamedCausalLM.from_pretrained)
    | arguments(StreamedCausalLM.generate, "prompt")
    | fields(langchain_grating.ChatGrating, BaseChatModel)
    | fields(GratingLLM, CustomLLM),
    "Agent memory": arguments(langchain_grating.GratingStore),
    "Serving": arguments(ServeSettings),
    "Calibrating": arguments(Reranker.calibrate),
    "Simulating": {parameter.opts[0] for parameter in get_command(app).commands["simulate"].params},  # type: ignore[attr-defined]
    "Distilling": arguments(distill),
}


def test_the_tables_of_parameters_are_the_codes() -> None:
    page = render_parameters.PAGE.read_text(encoding="utf-8")
    assert page == render_parameters.render(page), "run scripts/render_parameters.py"


@pytest.mark.parametrize("title", SETTINGS)
def test_the_tables_of_parameters_are_complete(title: str) -> None:
    page = render_parameters.PAGE.read_text(encoding="utf-8")
    section = page.split(f"## {title}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall("`([^`]*)`", row.split("|")[1] + row.split("|")[-2])}
    assert SETTINGS[title] - named == set()


def test_a_beginner_sees_six_settings_at_most() -> None:
    page = render_parameters.PAGE.read_text(encoding="utf-8")
    first = page.split("<!-- end of table -->")[0]
    assert len(re.findall(r"^\| `", first, re.MULTILINE)) <= 6


def test_the_picture_of_the_rooms_is_in_the_order_of_imports() -> None:
    text = (DOCS.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    picture = text.split("grating_core/\n")[1].split("\nintegrations/")[0]
    assert re.findall(r"(?:^|  )(\w+)(?:\.py|/) ", picture, re.MULTILINE) == [
        room for room in ROOMS if room != "door"
    ]


def test_the_family_that_is_the_example_is_in_the_code() -> None:
    root = DOCS.parent
    text = (root / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Adding a model family")[1]
    shown = re.findall(r"^```(?:python|text)\n(.*?)^```", text.split("\n## ")[0], re.MULTILINE | re.DOTALL)
    files = ("grating_core/models/decoders.py", "tests/core/conftest.py")
    code = "".join((root / file).read_text(encoding="utf-8") for file in files)
    assert len(shown) == 4
    assert [block for block in shown if block not in code] == []


@pytest.mark.parametrize(
    ("page", "names"),
    [
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
