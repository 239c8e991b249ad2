"""Options that several commands have, and the options that a command makes of the fields of a dataclass."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, fields, is_dataclass
from functools import partial, wraps
from pathlib import Path
from types import NoneType, SimpleNamespace, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from grating_core.cli.inputs import Format
from grating_core.cli.output import is_stream
from grating_core.settings import ModelSettings

BUNDLED = "bundled:ms-marco-minilm-l12"
HUB = ("revision", "cache_dir", "local_files_only")

# What the command line adds to settings: short names, and where the help shows them. Some are no options: whoever
# lists processes would see the token, a command always shows progress, and it ends before it could recalibrate.
_NO_OPTIONS = {"token", "show_progress", "recalibrate"}
_SHORT = {"model": "-m", "max_new_tokens": "-n"}
_SHOWN_IN = {
    **dict.fromkeys(("model", "device", "dtype", "max_length", "long_documents"), "model"),
    **dict.fromkeys(("template", "instruction", "adapter"), "model"),
    **dict.fromkeys(("pruning", "target", "guarantee", "lens"), "pruning"),
    **dict.fromkeys(("memory_budget", "mlp_density"), "memory"),
    **dict.fromkeys(HUB, "hub"),
}
_PANELS = ("input", "output", "model", "pruning", "memory", "hub")  # in the order of the help
in_panel = {name: partial(typer.Option, rich_help_panel=name.capitalize()) for name in _PANELS}

# Types that settings name, but whose modules take long to import. No option is of such a type.
_ELSEWHERE = {"torch": SimpleNamespace(device=object, dtype=object), "PruningPolicy": object, "Prompt": object}


def matching(pattern: str, told: str) -> Callable[[Any], Any]:
    """Return a callback that refuses what a pattern does not match, before anything is imported."""

    def check(value: Any) -> Any:
        if value is not None and not re.fullmatch(pattern, value.strip()):
            raise typer.BadParameter(f"{value!r} is not {told}.")
        return value

    return check


def writable(path: Any) -> Any:
    """Refuse a place that could not be written to, before anything is computed for it."""
    if path is not None and not is_stream(path):
        replaceable(path)
    elif path is not None and not os.access(path, os.W_OK):
        raise typer.BadParameter(f"{str(path)!r} may not be written to.")
    return path


def replaceable(path: Any) -> Any:
    """Refuse what is no file, and a file that could not be written, before anything is computed for it."""
    if path is not None and (os.path.isdir(path) or is_stream(path)):  # noqa: PTH112 - Path raises for a long name
        raise typer.BadParameter(f"{str(path)!r} is not a regular file.")
    if path is not None and not os.access(path.parent, os.W_OK | os.X_OK):
        raise typer.BadParameter(f"there is no directory {str(path.parent)!r} that may be written to.")
    return path


def not_blank(value: Any) -> Any:
    """Refuse an empty question."""
    if value is not None and not value.strip():
        raise typer.BadParameter("it is empty.")
    return value


# What typer checks by itself, or is to check before the module is imported that would refuse it.
_TYPES = {"dtype": Literal["auto", "float32", "bfloat16", "float16"]}
_CHECKS = {
    "device": matching(r"cpu|mps|cuda(:\d+)?", "cpu, cuda, cuda:N or mps"),
    "memory_budget": matching(r"(?i)0*[1-9]\d*|\d+(\.\d+)?\s*[KMG]I?B", "a size such as 300MB or 1.5GiB"),
}

Query = Annotated[str, typer.Option("--query", "-q", help="The question.", callback=not_blank)]
Input = Annotated[str, in_panel["input"]("--input", "-i", help="The file of documents, or - for standard input.")]
TopK = Annotated[int, typer.Option("--top-k", "-k", min=1, help="How many documents to return.")]
Candidates = Annotated[int, typer.Option(min=2, help="The number of documents of a request.")]
AsJson = Annotated[bool, in_panel["output"]("--json", help="Whether to print JSON.")]
Output = Annotated[
    Path | None,
    in_panel["output"](
        "--output", "-o", help="The file to write to. The default is standard output.", callback=writable
    ),
]


@dataclass(frozen=True, kw_only=True)
class InputOptions:
    """How a file of documents is read."""

    input_format: Annotated[
        Format, in_panel["input"](help="How the documents are stored. 'auto' goes by the file.")
    ] = "auto"
    field: Annotated[str, in_panel["input"](help="The JSON field or CSV column that holds the text.")] = "text"

    @property
    def reading(self) -> dict[str, Any]:
        """The same as arguments of :func:`read_records`."""
        return {"format": self.input_format, "field": self.field}


@dataclass(frozen=True)
class Takes:
    """Says which settings a command takes. It stands beside the class of the settings in ``Annotated``.

    Attributes:
        names: The settings besides the model, by name; None for all that are options.
        without: Those of all that make no sense in this command.
        required: Those that have to be given.
        model: What the option ``--model`` is by default; None makes the model an argument.
    """

    names: tuple[str, ...] | None = None
    without: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    model: str | None = None

    def options(self, settings: type[Any]) -> list[inspect.Parameter]:
        """Return an option for each setting that the command takes."""
        hints = get_type_hints(settings, localns=_ELSEWHERE)
        taken = [field for field in fields(settings) if field.name not in _NO_OPTIONS.union(self.without)]
        if self.names is not None:
            taken = [field for field in taken if field.name in ("model", *self.names)]
        return [self._option(field, hints[field.name]) for field in taken]

    def _option(self, setting: Field[Any], hint: Any) -> inspect.Parameter:
        name, told = setting.name, _told(setting.metadata["about"])
        default = inspect.Parameter.empty if name in self.required else setting.default
        kind = _TYPES.get(name) or _kind(hint)
        if name == "model" and self.model is None:
            return _parameter(name, inspect.Parameter.empty, kind, typer.Argument(help=told))
        flags = (_flag(name), _SHORT[name]) if name in _SHORT else (_flag(name),)
        option = in_panel[_SHOWN_IN[name]] if name in _SHOWN_IN else typer.Option
        shown = option(*flags, help=told, callback=_CHECKS.get(name))
        return _parameter(name, self.model if name == "model" else default, kind, shown)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _told(about: str) -> str:
    """Return what a setting is in words of the command line, which has neither None nor objects."""
    return re.sub(r" Python also takes [^.]*\.", "", about).replace(" None ", " The default ")


def _kind(hint: Any) -> Any:
    """Return that one of a setting's types which can be typed: a choice, text or a number; None if it may lack."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    choice = next((kind for kind in kinds if get_origin(kind) is Literal), None)
    kind = choice or (str if str in kinds else kinds[0])
    kind = list[str] if kind == Sequence[str] else kind
    return kind | None if NoneType in kinds else kind


def _parameter(name: str, default: Any, kind: Any, shown: Any) -> inspect.Parameter:
    annotation = kind if shown is None else Annotated[kind, shown]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command with an option for each field of those of its parameters that are dataclasses."""
    groups: dict[str, tuple[type[Any], list[str]]] = {}
    parameters: list[inspect.Parameter] = []
    hints = get_type_hints(command, include_extras=True)
    for name, given in inspect.signature(command).parameters.items():
        group, *marks = get_args(hints[name]) if get_origin(hints[name]) is Annotated else (hints[name],)
        if isinstance(group, type) and is_dataclass(group):
            options = marks[0].options(group) if marks else _options(group)
            groups[name] = group, [option.name for option in options]
        else:
            options = [_parameter(name, given.default, hints[name], None)]
        parameters += options
    parameters.sort(key=_panel)

    @wraps(command)
    def call(**given: Any) -> None:
        made = {
            name: _made(group, {option: given.pop(option) for option in options})
            for name, (group, options) in groups.items()
        }
        command(**given, **made)

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


def _options(group: type[Any]) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [_parameter(field.name, field.default, hints[field.name], None) for field in fields(group)]


def _made(group: type[Any], options: dict[str, Any]) -> Any:
    """Make a group of its options. What the group refuses is told by the name of the option."""
    if issubclass(group, ModelSettings):
        options["show_progress"] = True
    try:
        return group(**options)
    except ValueError as error:
        name, found, told = str(error).partition("=")
        if not found or name not in options:
            raise
        raise typer.BadParameter(f"{told}.", param_hint=_flag(name)) from error


def _panel(parameter: inspect.Parameter) -> int:
    panel = getattr(parameter.annotation.__metadata__[0], "rich_help_panel", None)
    return _PANELS.index(panel.lower()) + 1 if panel else 0
