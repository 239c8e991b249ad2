"""This module puts all commands together, and says what they do about errors."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from grating_core import __version__
from grating_core.cli.bench import bench
from grating_core.cli.cache import clear_cache, list_cache
from grating_core.cli.calibrate import calibrate
from grating_core.cli.demo import demo
from grating_core.cli.distill import distill
from grating_core.cli.doctor import doctor
from grating_core.cli.generate import generate
from grating_core.cli.mcp import mcp
from grating_core.cli.models import models
from grating_core.cli.options import BUNDLED, as_command, described
from grating_core.cli.output import forgive_encodings, tell, tell_error, told, write
from grating_core.cli.plan import plan
from grating_core.cli.rank import explain, rerank
from grating_core.cli.select import select
from grating_core.cli.serve import serve
from grating_core.cli.simulate import simulate
from grating_core.cli.status import BROKEN_PIPE, INTERRUPTED
from grating_core.errors import GratingError

# Each command with examples of its use.
_COMMANDS: dict[Callable[..., None], tuple[str, ...]] = {
    rerank: (
        'grating rerank -q "How many people live in Berlin?" -i documents.jsonl -k 3',
        'grating rerank -q "..." -i documents.csv --field body --format jsonl -o best.jsonl',
        "cat notes.txt | grating rerank -q \"...\" -i - --json | jq '.ranking[0].text'",
    ),
    explain: ('grating explain -q "..." -i documents.jsonl --plot scores.png',),
    select: ('grating select -q "Who did it?" -i book.txt -n 4000 > context.txt',),
    generate: (
        'grating generate Qwen/Qwen3-4B --memory-budget 3GB -p "How many people live in Berlin?"',
        "grating generate MODEL --raw --temperature 0.8 --seed 1 -p - < beginning.txt",
    ),
    serve: (f"grating serve {BUNDLED}", "grating serve MODEL --port 8000 --also small=OTHER"),
    mcp: (f"grating mcp {BUNDLED}", f"grating mcp {BUNDLED} --http --port 8081"),
    plan: (
        f"grating plan {BUNDLED} --memory-budget 110MB",
        "grating plan Qwen/Qwen3-4B --memory-budget 2GB --bits 4 --mlp-density 0.5 --kv-bits 8",
    ),
    calibrate: ("grating calibrate Qwen/Qwen3-Reranker-0.6B --corpus documents.jsonl",),
    bench: (f"grating bench {BUNDLED} --corpus documents.jsonl --queries queries.txt",),
    simulate: ("grating simulate MODEL --text book.txt --memory-budget 1GB --bits 4 --machine sata-ssd",),
    distill: ("grating distill MODEL --mlp-density 0.5 --text documents.jsonl --output recovered",),
    models: ("grating models BAAI/bge-reranker-v2-m3", "grating models --json | jq -r '.models[].name'"),
    doctor: ("grating doctor",),
    demo: ('grating demo -q "How do I copy a list?"',),
}


class _Commands(TyperGroup):
    """This group tells what goes wrong in a sentence, not in a traceback."""

    def invoke(self, ctx: Any) -> Any:
        forgive_encodings()
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise typer.Exit(BROKEN_PIPE) from error
        except KeyboardInterrupt as error:
            tell("Stopped.")
            raise typer.Exit(INTERRUPTED) from error
        except (GratingError, ValueError, OSError, ModuleNotFoundError) as error:
            tell_error(told(error))
            raise typer.Exit(2) from error
        except Exception as error:
            its_own = isinstance(error, typer.Abort) or hasattr(error, "exit_code")  # typer tells those itself
            if its_own or os.environ.get("GRATING_TRACEBACK"):
                raise
            tell_error(
                f"{type(error).__name__}: {error}. This should not happen: set GRATING_TRACEBACK=1 to see where "
                f"it does, and report it"
            )
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Commands,
    help="Rerank documents with a cross-encoder, on your own machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        write(f"grating {__version__}\n")
        raise typer.Exit


@app.callback()
def settings(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Rerank documents with a cross-encoder, on your own machine."""


def _add(to: typer.Typer, command: Callable[..., None], name: str, *examples: str) -> None:
    about, _ = described(command)
    to.command(name, help=about, epilog="\n\n".join(("Examples:", *examples)))(as_command(command))


for command, examples in _COMMANDS.items():
    _add(app, command, command.__name__, *examples)

cache = typer.Typer(help="List what lies in grating's cache, or clear it.", no_args_is_help=True)
_add(cache, list_cache, "list", "grating cache list --older-than 30d")
_add(cache, clear_cache, "clear", "grating cache clear --kind columns --older-than 4w --yes")
app.add_typer(cache, name="cache")
