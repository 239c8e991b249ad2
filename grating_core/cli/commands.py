"""The application: all commands, and what they do about errors."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from grating_core.cli.calibrate import calibrate
from grating_core.cli.demo import demo
from grating_core.cli.distill import distill
from grating_core.cli.doctor import doctor
from grating_core.cli.generate import generate
from grating_core.cli.models import models, plan
from grating_core.cli.options import expanded
from grating_core.cli.output import tell_error
from grating_core.cli.rank import explain, rerank
from grating_core.cli.select import select
from grating_core.cli.simulate import simulate
from grating_core.errors import GratingError


class _Commands(TyperGroup):
    """What the user can do something about is told in a sentence, not in a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (GratingError, ValueError, OSError, ModuleNotFoundError) as error:
            tell_error(str(error))
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=_Commands,
    help="Rerank documents with a cross-encoder, on your own machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

for command in (
    rerank,
    explain,
    select,
    generate,
    plan,
    calibrate,
    simulate,
    distill,
    models,
    doctor,
    demo,
):
    app.command()(expanded(command))
