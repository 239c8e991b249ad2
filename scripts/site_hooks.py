"""What the site takes from elsewhere: CONTRIBUTING.md, the notebooks, the command's options, the docstrings.

mkdocs.yml names this file twice: as hooks of MkDocs, and for the extension of griffe, which reads the docstrings.
"""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import textwrap
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from grating_core import settings

ROOT = Path(__file__).parent.parent
OPTIONS = "<!-- options -->"  # in cli.md

_DEFAULT = re.compile(r"(\w+Settings)\.(\w+)")
_NOTEBOOK_LINK = re.compile(r'href="(?:(\.\./)docs/)?([\w-]+)\.(?:md|ipynb)(?=["#])')
_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?([\w.]+)`")
_CODE_BLOCK = re.compile(r"^( *)\.\. code-block:: (\w+)\n\n((?:\1 +.*(?:\n|\Z)|\n)+)", re.MULTILINE)


def on_startup(command: Literal["build", "gh-deploy", "serve"], dirty: bool) -> None:
    """Say only what is wrong: with MkDocs' own ``--quiet``, warnings neither show nor fail a strict build."""
    if command == "build":
        logging.getLogger("mkdocs").setLevel(logging.WARNING)


@event_priority(100)  # before mkdocs-jupyter, which then finds them
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the notebooks and CONTRIBUTING.md, which are not in ``docs/``."""
    for path in (ROOT / "CONTRIBUTING.md", *sorted((ROOT / "notebooks").glob("*.ipynb"))):
        name = path.relative_to(ROOT).as_posix()
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Put the command's options into the page that has a place for them."""
    return markdown.replace(OPTIONS, _command_reference()) if OPTIONS in markdown else markdown


def on_page_content(html: str, page: Page, **_: Any) -> str:
    """Let the links of notebooks, to each other and to ``../docs``, lead to pages; MkDocs does so for Markdown."""
    return _NOTEBOOK_LINK.sub(r'href="\1\2.html', html) if page.file.src_uri.endswith(".ipynb") else html


def _command_reference() -> str:
    """The commands and their options as typer describes them, a level below the page's title."""
    call = [sys.executable, "-m", "typer", "grating_core.cli.commands", "utils", "docs", "--name", "grating"]
    described = subprocess.run(call, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return described[described.index("## ") :]


class PlainMarkdown(griffe.Extension):
    """Docstrings are written for Sphinx, as both frameworks' are: its roles and code blocks become Markdown.

    Settings are described where they are declared: their descriptions become docstrings, their defaults values.
    """

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Describe the fields of the settings' classes."""
        if cls.module.path == settings.__name__:
            for field in fields(getattr(settings, cls.name)):
                if field.name in cls.members:
                    cls.members[field.name].docstring = griffe.Docstring(field.metadata["about"])

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Show a default that is taken from the settings as the value that it is."""
        for parameter in func.parameters:
            if found := _DEFAULT.fullmatch(str(parameter.default)):
                parameter.default = repr(getattr(getattr(settings, found[1]), found[2]))

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of an object that has been loaded."""
        if obj.docstring is not None:
            obj.docstring.value = _CODE_BLOCK.sub(_fenced, _ROLE.sub(r"`\1`", obj.docstring.value))


def _fenced(block: re.Match[str]) -> str:
    indent, language, code = block.groups()
    text = f"```{language}\n{textwrap.dedent(code).strip()}\n```\n"
    return textwrap.indent(text, indent)
