"""The grating command in this process."""

from typer.testing import CliRunner, Result

from grating_core.cli.commands import app

QUERY = "How many people live in Berlin?"
DOCUMENTS = [
    "New York City is famous for the Metropolitan Museum of Art.",
    "Berlin had a population of 3,520,031 registered inhabitants in 2015.",
    "Berlin is well known for its museums.",
]


def grating(*arguments: str, stdin: str | bytes = "") -> Result:
    return CliRunner().invoke(app, arguments, input=stdin)
