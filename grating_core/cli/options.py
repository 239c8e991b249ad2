"""Options that several commands have, each declared once, and how a command takes many of them as one argument."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from grating_core.inputs import Format

BUNDLED = "bundled:ms-marco-minilm-l12"

Query = Annotated[str, typer.Option("--query", "-q", help="The question.")]
Input = Annotated[str, typer.Option("--input", "-i", help="File of documents, or - for standard input.")]
InputFormat = Annotated[Format, typer.Option("--format", help="How the documents are stored.")]
Field = Annotated[str, typer.Option(help="JSON field or CSV column that holds the text.")]
TopK = Annotated[int, typer.Option("--top-k", "-k", help="How many to return.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
ModelName = Annotated[str, typer.Argument(help="Hub id, local directory or bundled name.")]

Device = Annotated[str | None, typer.Option(help="cpu, cuda or mps; the best there is by default.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
MaxLength = Annotated[int | None, typer.Option(help="Most tokens of query and document together.")]
TemplateName = Annotated[str | None, typer.Option(help="Official prompt of a decoder, if its name does not tell.")]
Instruction = Annotated[str | None, typer.Option(help="What to judge by, for models that take an instruction.")]
Adapter = Annotated[str | None, typer.Option(help="LoRA adapter: directory or hub id.")]
Budget = Annotated[str | None, typer.Option(help="Memory it may take, such as 300MB; no bound by default.")]
MlpDensity = Annotated[float | None, typer.Option(help="Share of the MLPs' weights that is used; all by default.")]
Target = Annotated[float, typer.Option(help="Share of the full model's top K that a lens promises to keep.")]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Arguments of both ``from_pretrained``: how a model is loaded."""

    device: Device = None
    dtype: Dtype = "auto"
    max_length: MaxLength = None
    adapter: Adapter = None
    memory_budget: Budget = None


@dataclass(frozen=True, kw_only=True)
class RerankerOptions(ModelOptions):
    """Arguments of :meth:`Reranker.from_pretrained`."""

    model: Annotated[str, typer.Option("--model", "-m", help="Hub id, local directory or bundled name.")] = BUNDLED
    template: TemplateName = None
    instruction: Instruction = None
    mlp_density: MlpDensity = None
    pruning: Annotated[str, typer.Option(help="auto, cluster or off.")] = "auto"
    target: Target = 0.98
    guarantee: Annotated[str, typer.Option(help="share, or set: the whole top K, so often.")] = "share"
    lens: Annotated[Path | None, typer.Option(help="Lens to prune by; the model's own by default.")] = None


@dataclass(frozen=True, kw_only=True)
class RankingOptions(RerankerOptions):
    """The same where documents are ranked as they are."""

    long_documents: Annotated[
        str, typer.Option(help="truncate, or windows: the best window of a document counts.")
    ] = "truncate"


@dataclass(frozen=True, kw_only=True)
class GeneratorOptions(ModelOptions):
    """Arguments of :meth:`StreamedCausalLM.from_pretrained`."""

    mlp_density: MlpDensity = None
    max_length: Annotated[int | None, typer.Option(help="Most tokens of prompt and answer together.")] = None


@dataclass(frozen=True, kw_only=True)
class InputOptions:
    """How a file of documents is read."""

    format: InputFormat = "auto"
    field: Field = "text"


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for each field of those of its parameters that are dataclasses."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            parameters += _options(groups[name])
        else:
            parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))

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
