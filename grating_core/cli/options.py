"""Options that several commands have, each declared once, and how a command takes many of them as one argument."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from grating_core.cli.inputs import Format

BUNDLED = "bundled:ms-marco-minilm-l12"

_PANELS = ("input", "output", "model", "pruning", "memory", "hub")  # in the order of the help
in_panel = {name: partial(typer.Option, rich_help_panel=name.capitalize()) for name in _PANELS}


def matching(pattern: str, told: str) -> Callable[[Any], Any]:
    """A callback that refuses what a pattern does not match, before anything is imported."""

    def check(value: Any) -> Any:
        if value is not None and not re.fullmatch(pattern, value.strip()):
            raise typer.BadParameter(f"{value!r} is not {told}.")
        return value

    return check


def _check_share(value: Any) -> Any:
    if value is not None and not 0 < value < 1:
        raise typer.BadParameter(f"{value} is not between 0 and 1.")
    return value


def _check_density(value: Any) -> Any:
    if value is not None and not 0 < value <= 1:
        raise typer.BadParameter(f"{value} is not above 0 and at most 1.")
    return value


def writable(path: Any) -> Any:
    """Refuse a file that could not be written, before anything is computed for it."""
    # os.path, unlike Path, takes a name that no file can have for one that is not there.
    if path is not None and os.path.exists(path) and not os.path.isfile(path):  # noqa: PTH110, PTH113
        raise typer.BadParameter(f"{str(path)!r} is not a regular file.")
    if path is not None and not os.access(path.parent, os.W_OK | os.X_OK):
        raise typer.BadParameter(f"there is no directory {str(path.parent)!r} that may be written to.")
    return path


def not_blank(value: Any) -> Any:
    """Refuse an empty question."""
    if value is not None and not value.strip():
        raise typer.BadParameter("it is empty.")
    return value


_SIZE = matching(r"(?i)0*[1-9]\d*|\d+(\.\d+)?\s*[KMG]I?B", "a size such as 300MB or 1.5GiB")

Query = Annotated[str, typer.Option("--query", "-q", help="The question.", callback=not_blank)]
Input = Annotated[str, in_panel["input"]("--input", "-i", help="File of documents, or - for standard input.")]
TopK = Annotated[int, typer.Option("--top-k", "-k", min=1, help="How many to return.")]
AsJson = Annotated[bool, in_panel["output"]("--json", help="Print JSON.")]
ModelName = Annotated[str, typer.Argument(help="Hub id, local directory or bundled name.")]

Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"], in_panel["model"](help="What the layers compute in.")
]
Device = Annotated[
    str | None,
    in_panel["model"](
        help="cpu, cuda, cuda:N or mps; the best there is by default.",
        callback=matching(r"cpu|mps|cuda(:\d+)?", "cpu, cuda, cuda:N or mps"),
    ),
]
MaxLength = Annotated[int | None, in_panel["model"](min=1, help="Most tokens of query and document together.")]
TemplateName = Annotated[
    str | None, in_panel["model"](help="Official prompt of a decoder, if its name does not tell.")
]
Instruction = Annotated[str | None, in_panel["model"](help="What to judge by, if the model takes an instruction.")]
Adapter = Annotated[str | None, in_panel["model"](help="LoRA adapter: directory or hub id.")]
Budget = Annotated[
    str | None,
    in_panel["memory"](help="Memory it may take, such as 300MB; no bound by default.", callback=_SIZE),
]
GivenBudget = Annotated[str, in_panel["memory"](help="Memory it may take, such as 300MB.", callback=_SIZE)]
Target = Annotated[
    float,
    in_panel["pruning"](help="Share of the full model's top K that a lens promises.", callback=_check_share),
]
Output = Annotated[
    Path | None,
    in_panel["output"](
        "--output", "-o", help="Write it to this file; standard output by default.", callback=writable
    ),
]


@dataclass(frozen=True, kw_only=True)
class HubOptions:
    """How the hub is asked. The token is no option, which others could see: ``HF_TOKEN`` has it."""

    revision: Annotated[
        str | None, in_panel["hub"](help="Branch, tag or commit of the model; the newest by default.")
    ] = None
    cache_dir: Annotated[
        Path | None, in_panel["hub"](help="Where the hub's files are kept; the hub's own place by default.")
    ] = None
    local_files_only: Annotated[
        bool, in_panel["hub"]("--local-files-only", help="Use what is kept there, without asking the hub.")
    ] = False


@dataclass(frozen=True, kw_only=True)
class ModelOptions(HubOptions):
    """Arguments of both ``from_pretrained``: how a model is loaded."""

    device: Device = None
    dtype: Dtype = "auto"
    max_length: MaxLength = None
    adapter: Adapter = None
    memory_budget: Budget = None


@dataclass(frozen=True, kw_only=True)
class RerankerOptions(ModelOptions):
    """Arguments of :meth:`Reranker.from_pretrained`."""

    model: Annotated[str, in_panel["model"]("--model", "-m", help="Hub id, local directory or bundled name.")] = (
        BUNDLED
    )
    template: TemplateName = None
    instruction: Instruction = None
    pruning: Annotated[
        Literal["auto", "cluster", "off"], in_panel["pruning"](help="How candidates are dropped early.")
    ] = "auto"
    target: Target = 0.98
    guarantee: Annotated[
        Literal["share", "set"], in_panel["pruning"](help="set: the whole top K is kept, so often.")
    ] = "share"
    lens: Annotated[Path | None, in_panel["pruning"](help="Lens to prune by; the model's own by default.")] = None


@dataclass(frozen=True, kw_only=True)
class RankingOptions(RerankerOptions):
    """The same where documents are ranked as they are."""

    long_documents: Annotated[
        Literal["truncate", "windows"],
        in_panel["model"](help="windows: the best window of a document counts."),
    ] = "truncate"


@dataclass(frozen=True, kw_only=True)
class GeneratorOptions(ModelOptions):
    """Arguments of :meth:`StreamedCausalLM.from_pretrained`."""

    mlp_density: Annotated[
        float | None,
        in_panel["memory"](
            help="Share of the MLPs' weights that is used; all by default.", callback=_check_density
        ),
    ] = None
    max_length: Annotated[
        int | None, in_panel["model"](min=1, help="Most tokens of prompt and answer together.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class InputOptions:
    """How a file of documents is read."""

    input_format: Annotated[
        Format, in_panel["input"](help="How the documents are stored; auto goes by the file.")
    ] = "auto"
    field: Annotated[str, in_panel["input"](help="JSON field or CSV column that holds the text.")] = "text"

    @property
    def reading(self) -> dict[str, Any]:
        """The same as arguments of :func:`read_records`."""
        return {"format": self.input_format, "field": self.field}


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for each field of those of its parameters that are dataclasses."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            parameters += _options(groups[name])
        else:
            parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))

    parameters.sort(key=_panel)

    @wraps(command)
    def call(**given: Any) -> None:
        made = {
            name: group(**{field.name: given.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**given, **made)

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


def _panel(parameter: inspect.Parameter) -> int:
    panel = getattr(parameter.annotation.__metadata__[0], "rich_help_panel", None)
    return _PANELS.index(panel.lower()) + 1 if panel else 0


def _options(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(group)
    ]
