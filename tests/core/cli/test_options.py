"""Options that are settings: their names, types, defaults and texts are those of the one list."""

import re
from dataclasses import fields
from typing import Any

import pytest
from typer.main import get_command

from grating_core.cli.commands import app
from grating_core.serving.settings import ServeSettings
from grating_core.settings import AnswerSettings, GenerationSettings, ModelSettings, RerankSettings
from tests.core.cli.conftest import grating

NO_OPTIONS = {"token", "show_progress", "recalibrate"}
COMMANDS = {
    "rerank": RerankSettings, "explain": RerankSettings, "select": RerankSettings, "calibrate": RerankSettings,
    "plan": RerankSettings, "bench": RerankSettings, "generate": GenerationSettings, "distill": ModelSettings,
    "simulate": ModelSettings, "serve": RerankSettings, "mcp": RerankSettings,
}  # fmt: skip
OWN = {
    ("distill", "mlp_density"),
    ("distill", "seed"),
    *((command, "seed") for command in ("calibrate", "bench")),
    ("simulate", "mlp_density"),
    ("simulate", "dtype"),
}
"""Options of another meaning than the setting of the same name."""


def options(command: str) -> dict[str, Any]:
    return {option.name: option for option in get_command(app).commands[command].params}  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", COMMANDS)
def test_an_option_that_is_a_setting_has_its_default_and_its_text(command: str) -> None:
    settings = {field.name: field for field in (*fields(COMMANDS[command]), *fields(AnswerSettings))}
    found = {name: option for name, option in options(command).items() if name in settings}
    assert {"model", "revision", "cache_dir", "local_files_only"} <= set(found)
    for name, option in found.items():
        if (command, name) in OWN:
            continue
        assert option.help[:20] == settings[name].metadata["about"][:20]
        assert not re.search(r"\bNone\b|Python", option.help)
        if not option.required and name != "model":
            assert option.default == settings[name].default
        assert option.opts[0] in (f"--{name.replace('_', '-')}", "model")


def test_every_setting_is_an_option_of_its_command_or_named_as_none() -> None:
    for command, settings in (
        ("rerank", RerankSettings),
        ("generate", GenerationSettings),
        ("generate", AnswerSettings),
        ("serve", RerankSettings),
        ("serve", ServeSettings),
        ("mcp", RerankSettings),
    ):
        assert {field.name for field in fields(settings)} - set(options(command)) <= NO_OPTIONS


def test_no_help_begins_with_a_preposition_and_each_is_a_sentence() -> None:
    group = get_command(app)
    named = {**group.commands, **{f"cache {n}": c for n, c in group.commands["cache"].commands.items()}}  # type: ignore[attr-defined]
    for command, found in named.items():
        for option in found.params:
            told = option.help
            assert told.endswith("."), (command, option.name, told)
            assert not re.match(r"(Of|For|From|In|As|By|At|To|With|On|Without)\b", told), (command, told)


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--target", "1.5", "1.5 must be a number between 0 and 1"),
        ("--target", "nan", "nan must be a number between 0 and 1"),
        ("--max-length", "0", "0 must be"),
        ("--lens", "x", "'off'"),
    ],
)
def test_what_a_setting_cannot_be_is_told_by_the_name_of_its_option(option: str, value: str, told: str) -> None:
    done = grating("rerank", "-q", "q", "-i", "/no/such", option, value, "--pruning", "off")
    assert done.exit_code == 2
    assert f"Invalid value for '{option}'" in " ".join(done.stderr.split()) or option in done.stderr
    assert told in " ".join(done.stderr.split())
    assert "/no/such" not in done.stderr
