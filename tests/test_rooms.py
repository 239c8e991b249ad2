"""The core's rooms: imports run one way, files are short, and nobody reads a private name of another file."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = ROOT / "grating_core"

# A room may import those before it, and none of those behind it. The door is what "import grating_core" gives.
ROOMS = [
    "errors", "arguments", "forking", "files", "lifetime", "pruning", "requests", "results", "memory", "kernels",
    "layers", "columns", "models", "text", "lens", "engine", "settings", "telemetry", "opening",
    "calibrating", "reranker", "generation", "context",
    "frameworks", "lab", "demo", "door", "serving", "cli",
]  # fmt: skip
BESIDE = [("pruning", "memory"), ("reranker", "generation")]  # neither imports the other

LINES = 350
FEWER_LINES = {"generation.py": 300, "reranker.py": 300}

# Names with an underscore that are not private: their libraries have them for whoever extends or ends something.
FOREIGN = {
    "_exit", "_replace", "_generate", "_stream", "_postprocess_nodes",
    "_identifying_params", "_get_ls_params", "_linear_pointwise", "_is_mkldnn_bf16_supported",
    "_is_mkldnn_fp16_supported", "_int_mm",
}  # fmt: skip


def imports(tree):
    """Return the dotted names that a file imports of the core, wherever the import stands in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "a relative import"
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def file_of(name):
    """Return the file of the core that a dotted name leads to, as a path below it, or None."""
    parts = name.split(".")
    if parts[0] != "grating_core":
        return None
    for length in range(len(parts), 0, -1):
        path = CORE.joinpath(*parts[1:length])
        for found in (path.with_suffix(".py"), path / "__init__.py"):
            if found.is_file():
                return found.relative_to(CORE).as_posix()
    return None


def room_of(file):
    top = file.split("/")[0].removesuffix(".py")
    return {"__init__": "door", "__main__": "cli"}.get(top, top)


FILES = {
    path.relative_to(CORE).as_posix(): path.read_text(encoding="utf-8") for path in sorted(CORE.rglob("*.py"))
}
TREES = {file: ast.parse(text) for file, text in FILES.items()}
IMPORTS = {
    file: {found for name in imports(tree) if (found := file_of(name))} - {file} for file, tree in TREES.items()
}


def test_imports_are_absolute():
    assert [file for file, tree in TREES.items() if "a relative import" in imports(tree)] == []


def test_every_file_is_in_a_room_and_every_room_is_there():
    assert {room_of(file) for file in FILES} == set(ROOMS)


def test_imports_run_one_way():
    back = {
        (file, room_of(other))
        for file, others in IMPORTS.items()
        for other in others
        if ROOMS.index(room_of(other)) > ROOMS.index(room_of(file))
    }
    assert back == set()


@pytest.mark.parametrize(("first", "second"), BESIDE)
def test_rooms_beside_each_other_do_not_know_of_each_other(first, second):
    known = {(room_of(file), room_of(other)) for file, others in IMPORTS.items() for other in others}
    assert not known & {(first, second), (second, first)}


def test_no_files_import_each_other_in_a_circle():
    TopologicalSorter(IMPORTS).prepare()


def test_no_folders_import_each_other_in_a_circle():
    rooms = {}
    for file, others in IMPORTS.items():
        rooms.setdefault(room_of(file), set()).update(map(room_of, others))
        rooms[room_of(file)].discard(room_of(file))
    TopologicalSorter(rooms).prepare()


def test_contributing_shows_the_rooms_in_this_order():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    picture = text.partition("\ngrating_core/\n")[2].partition("\nintegrations/")[0]
    shown = re.findall(r"(?:^|\s{3,})([a-z]+)(?:\.py|/)\s", picture, re.MULTILINE)
    assert shown == [room for room in ROOMS if room != "door"]


def test_no_file_is_long():
    long = {file for file, text in FILES.items() if text.count("\n") > FEWER_LINES.get(file, LINES)}
    assert long == set()


def private_names(tree):
    """Return the private names of other files that a file reads, also in texts that are code or lead to a name."""
    own = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    own |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    own |= {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not is_own(node):
            yield from {node.attr} - own
        elif isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Call) and len(node.args) > 1 and "attr" in ast.unparse(node.func):
            yield from {node.args[1].value} - own if isinstance(node.args[1], ast.Constant) else ()
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from names_in(node.value)


def is_own(node):
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def names_in(text):
    """Return the names to which a text leads that is a dotted name or a whole program."""
    if re.fullmatch(r"(grating_core|langchain_grating|llama_index)(\.\w+)+", text):
        yield from text.split(".")
    elif "import " in text and "\n" in text:
        try:
            yield from private_names(ast.parse(text))
        except SyntaxError:  # it is no program
            return


@pytest.mark.parametrize("folder", ["grating_core", "integrations", "benchmarks", "scripts", "tests"])
def test_nobody_reads_a_private_name_of_another_file(folder):
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        names = {
            name for name in private_names(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(name, str)
        }
        hidden = {name for name in names if re.match("_[^_]", name)} - FOREIGN
        if hidden:
            found[path.relative_to(ROOT).as_posix()] = hidden
    assert found == {}
