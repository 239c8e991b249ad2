"""The options of a command are made of what is there: arguments and docstring, and the fields of dataclasses.

An option of one name means the same in each command, so what the command line adds goes by the name.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from types import NoneType, SimpleNamespace, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from grating_core.cli.inputs import Format, read_documents
from grating_core.cli.output import is_stream
from grating_core.settings import ModelSettings

BUNDLED = "bundled:ms-marco-minilm-l12"
HUB = ("revision", "cache_dir", "local_files_only")
_EMPTY = inspect.Parameter.empty

# These settings are no options: whoever lists processes would see a token, a command always shows progress, and
# most end before there is time to recalibrate.
_NO_OPTIONS = {"token", "show_progress", "recalibrate"}

# Types that settings name, but whose modules take long to import. No option is of such a type.
_ELSEWHERE = {"torch": SimpleNamespace(device=object, dtype=object), "PruningPolicy": object, "Prompt": object}


def _refusing(pattern: str, told: str) -> Callable[[Any], Any]:
    """Return a check that refuses what a pattern does not match, before anything is imported."""

    def check(value: Any) -> Any:
        if value is not None and not re.fullmatch(pattern, value.strip()):
            raise typer.BadParameter(f"{value!r} is not {told}.")
        return value

    return check


def _writable(path: Any) -> Any:
    """Refuse a place that could not be written to, before anything is computed for it."""
    if path is None or not is_stream(path):
        return _replaceable(path)
    if not os.access(path, os.W_OK):
        raise typer.BadParameter(f"{str(path)!r} may not be written to.")
    return path


def _replaceable(path: Any) -> Any:
    """Refuse what is no file, and a file that could not be written, before anything is computed for it."""
    if path is not None and (os.path.isdir(path) or is_stream(path)):  # noqa: PTH112 - Path raises for a long name
        raise typer.BadParameter(f"{str(path)!r} is not a regular file.")
    if path is not None and not os.access(path.parent, os.W_OK | os.X_OK):
        raise typer.BadParameter(f"there is no directory {str(path.parent)!r} that may be written to.")
    return path


_PANELS = {
    "input": ("input", "corpus", "queries", "qrels", "input_format", "field", "id_field"),
    "output": ("plot", "format", "as_json", "output"),
    "model": (
        "model",
        "engine",
        "device",
        "dtype",
        "max_length",
        "long_documents",
        "template",
        "instruction",
        "cutoff_layers",
        "adapter",
    ),
    "pruning": ("pruning", "target", "guarantee", "lens", "recalibrate", "scores"),
    "memory": (
        "memory_budget",
        "bits",
        "kv_bits",
        "mlp_density",
        "inputs_preference",
        "products_preference",
    ),
    "hub": HUB,
    "server": ("http", "host", "port", "api_key", "name", "also"),
    "limits": ("max_body", "max_documents", "max_tokens", "queue_tokens", "deadline", "drain"),
}  # in the order of the help; an option of another name is in none
_FLAGS = {"as_json": "--json", "chat": "--chat/--raw", "directory": "--output"}
_SHORT = {
    "query": "-q", "input": "-i", "output": "-o", "top_k": "-k", "model": "-m", "prompt": "-p", "yes": "-y",
    "max_tokens": "-n", "max_new_tokens": "-n",
}  # fmt: skip
_LEAST = dict.fromkeys(("top_k", "requests", "rounds", "threads", "tokens", "max_tokens", "chunk_tokens"), 1)
_LEAST["candidates"] = 2
_TYPES = {"dtype": Literal["auto", "float32", "bfloat16", "float16", "int8"]}
_CHECKS = {
    "query": _refusing(r"(?s).*\S.*", "a question"),
    "device": _refusing(r"cpu|mps|cuda(:\d+)?", "cpu, cuda, cuda:N or mps"),
    "memory_budget": _refusing(r"(?i)0*[1-9]\d*|\d+(\.\d+)?\s*[KMG]I?B", "a size such as 300MB or 1.5GiB"),
    "older_than": _refusing(r"\d+(\.\d+)?[smhdw]", "a time such as 30d, 12h or 2w"),
    "output": _writable,
    "plot": _replaceable,
    "figure": _replaceable,
}
_TEXTS = {
    "query": "The question.",
    "input": "The file of documents, or - for standard input.",
    "top_k": "How many documents to return.",
    "candidates": "The number of documents of a request.",
    "as_json": "Whether to print JSON.",
    "output": "The file to write to. The default is standard output.",
}


@dataclass(frozen=True, kw_only=True)
class InputOptions:
    """These options say how a file of documents is read.

    Attributes:
        input_format: How the documents are stored. 'auto' goes by the file.
        field: The JSON field or CSV column that holds the text.
    """

    input_format: Format = "auto"
    field: str = "text"

    def documents(self, source: str | Path, plain: Literal["lines", "text"] = "lines") -> list[str]:
        """Read the texts of a file, or of standard input; see :func:`read_documents`."""
        return read_documents(str(source), format=self.input_format, field=self.field, plain=plain)


@dataclass(frozen=True)
class Takes:
    """Says which settings a command takes. It stands beside the class of the settings in ``Annotated``.

    Attributes:
        names: The settings besides the model, by name; None for all that can be options.
        without: Those of all that make no sense in this command.
        beside: Those that are options of this command, though not of most.
        required: Those that have to be given.
        model: What the option ``--model`` is by default; None makes the model an argument.
        optional: Whether the argument may be left out. The command then gets None instead of the settings.
    """

    names: tuple[str, ...] | None = None
    without: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    model: str | None = None
    optional: bool = False

    def options(self, settings: type[Any]) -> list[inspect.Parameter]:
        """Return an option for each setting that the command takes."""
        hints = get_type_hints(settings, localns=_ELSEWHERE)
        left_out = _NO_OPTIONS.difference(self.beside).union(self.without)
        taken = [field for field in fields(settings) if field.name not in left_out]
        if self.names is not None:
            taken = [field for field in taken if field.name in ("model", *self.names)]
        model = self.model or (None if self.optional else _EMPTY)
        defaults = dict.fromkeys(self.required, _EMPTY) | {"model": model}
        return [
            _option(
                field.name,
                defaults.get(field.name, field.default),
                _TYPES.get(field.name, hints[field.name]),
                _of_the_command_line(field.metadata["about"]),
            )
            for field in taken
        ]


def _of_the_command_line(about: str) -> str:
    """Return what a setting is in words of the command line, which has neither None nor objects."""
    return re.sub(r" Python also takes [^.]*\.", "", about).replace(" None ", " The default ")


def as_command(function: Callable[..., None]) -> Callable[..., None]:
    """Return a function as typer takes it: an option for each argument, and for each field of a dataclass."""
    groups: dict[str, tuple[type[Any], list[str]]] = {}
    parameters: list[inspect.Parameter] = []
    hints = get_type_hints(function, include_extras=True)
    texts = _TEXTS | described(function)[1]  # no texts under python -OO
    for name, given in inspect.signature(function).parameters.items():
        group, *marks = get_args(hints[name]) if get_origin(hints[name]) is Annotated else (hints[name],)
        group = next((kind for kind in get_args(group) if is_dataclass(kind)), group)  # None may stand beside it
        if isinstance(group, type) and is_dataclass(group):
            options = marks[0].options(group) if marks else _options(group)
            groups[name] = group, [option.name for option in options]
        else:
            options = [_option(name, given.default, hints[name], texts.get(name, ""))]
        parameters += options
    parameters.sort(key=_panel)

    @wraps(function)
    def call(**given: Any) -> None:
        made = {
            name: _made(group, {option: given.pop(option) for option in options})
            for name, (group, options) in groups.items()
        }
        function(**given, **made)

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


def described(thing: Any) -> tuple[str, dict[str, str]]:
    """Return what a docstring says of a function or class, and of each of its arguments or fields."""
    about, *rest = re.split(r"\n\n(?:Args|Attributes):\n", inspect.getdoc(thing) or "")
    told = re.finditer(r"^    (\w+): (.+(?:\n {8}.+)*)", "".join(rest), re.MULTILINE)
    return about, {found[1]: " ".join(found[2].split()) for found in told}


def _options(group: type[Any]) -> list[inspect.Parameter]:
    hints, texts = get_type_hints(group), _TEXTS | described(group)[1]
    for base in group.__bases__:
        texts |= described(base)[1]
    defaults = {field.name: _EMPTY if field.default is MISSING else field.default for field in fields(group)}
    return [_option(name, default, hints[name], texts.get(name, "")) for name, default in defaults.items()]


def _option(name: str, default: Any, hint: Any, told: str) -> inspect.Parameter:
    kind, shown = _typed(hint), typer.Argument(help=told)
    if name != "model" or isinstance(default, str):
        flags = [_FLAGS.get(name, _flag(name)), *([_SHORT[name]] if name in _SHORT else ())]
        panel = next((panel.capitalize() for panel, names in _PANELS.items() if name in names), None)
        shown = typer.Option(
            *flags, help=told, min=_LEAST.get(name), callback=_CHECKS.get(name), rich_help_panel=panel
        )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, shown]
    )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _typed(hint: Any) -> Any:
    """Return what can be typed of a type: a choice, text, a number or several of them; None if it may lack."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    choice = next((kind for kind in kinds if get_origin(kind) is Literal), None)
    kind = choice or (str if str in kinds else kinds[0])
    kind = list[get_args(kind)] if get_origin(kind) is get_origin(Sequence[str]) else kind  # type: ignore[misc]
    return kind | None if NoneType in kinds else kind


def _made(group: type[Any], options: dict[str, Any]) -> Any:
    """Make a group of its options. What the group refuses is told by the name of the option."""
    if options.get("model", "") is None:
        return None
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
    names = [parameter.name in names for names in _PANELS.values()]
    return names.index(True) + 1 if True in names else 0
