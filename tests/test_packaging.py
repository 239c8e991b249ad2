"""What is published: four distributions, each as a wheel and as a source distribution."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import grating_core
from hatch_build import with_links

ROOT = Path(__file__).parent.parent
DISTRIBUTIONS = {
    "grating-core": ROOT,
    "langchain-grating": ROOT / "integrations/langchain",
    "llama-index-postprocessor-grating": ROOT / "integrations/llamaindex",
    "llama-index-llms-grating": ROOT / "integrations/llamaindex-llms",
}
IN_WHEELS = {
    "grating-core": "grating_core",
    "langchain-grating": "langchain_grating",
    "llama-index-postprocessor-grating": "llama_index/postprocessor/grating",
    "llama-index-llms-grating": "llama_index/llms/grating",
}
COMMON = {"PKG-INFO", "pyproject.toml", "README.md", "LICENSE"}
IN_SDISTS = {  # .gitignore: hatchling always takes it along
    "grating-core": {
        *COMMON,
        "CHANGELOG.md",
        "benchmarks",
        "hatch_build.py",
        "grating_core",
        "tests",
        ".gitignore",
    },
    "langchain-grating": {*COMMON, "langchain_grating", ".gitignore"},
    "llama-index-postprocessor-grating": {*COMMON, "llama_index", ".gitignore"},
    "llama-index-llms-grating": {*COMMON, "llama_index", ".gitignore"},
}
EVERY = pytest.mark.parametrize("name", DISTRIBUTIONS)
RELATIVE_LINK = re.compile(r"\]\((?!https?:|#)")


def build(source: Path, target: str, output: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(output)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (built,) = output.iterdir()
    return built


def project(name: str) -> dict[str, Any]:
    return tomllib.loads((DISTRIBUTIONS[name] / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def sdists(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: build(path, "sdist", tmp_path_factory.mktemp("sdist")) for name, path in DISTRIBUTIONS.items()}


@pytest.fixture(scope="module")
def wheels(sdists: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Built from the source distributions, outside the repository, as whoever builds them does."""
    built = {}
    for name, sdist in sdists.items():
        with tarfile.open(sdist) as archive:
            archive.extractall(sources := tmp_path_factory.mktemp("sources"), filter="data")
        built[name] = build(next(sources.iterdir()), "wheel", tmp_path_factory.mktemp("wheel"))
    return built


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode("utf-8"))


@EVERY
def test_a_wheel_holds_its_package_and_nothing_else(name: str, wheels: dict[str, Path]) -> None:
    with zipfile.ZipFile(wheels[name]) as archive:
        names = archive.namelist()
        licenses = [file for file in names if file.endswith(".dist-info/licenses/LICENSE")]
        assert archive.read(licenses[0]) == (ROOT / "LICENSE").read_bytes()
    files = {file for file in names if ".dist-info/" not in file}
    package = DISTRIBUTIONS[name] / IN_WHEELS[name]
    kept = (path for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc")
    assert files == {path.relative_to(DISTRIBUTIONS[name]).as_posix() for path in kept}
    assert f"{IN_WHEELS[name]}/py.typed" in files
    assert "llama_index/__init__.py" not in files
    assert name != "grating-core" or any("packaged" in file for file in files)


@EVERY
def test_a_source_distribution_holds_what_building_and_testing_take(name: str, sdists: dict[str, Path]) -> None:
    with tarfile.open(sdists[name]) as archive:
        names = [member.name.split("/", 1)[1] for member in archive.getmembers() if "/" in member.name]
    assert {file.split("/")[0] for file in names} == IN_SDISTS[name]
    assert not [file for file in names if "__pycache__" in file or file.endswith((".pyc", ".png", ".ipynb"))]


@EVERY
def test_the_index_is_told_whose_it_is_and_where_it_runs(name: str, wheels: dict[str, Path]) -> None:
    told = metadata(wheels[name])
    assert told["Version"] == grating_core.__version__
    assert told["License-Expression"] == "Apache-2.0"
    assert told["License-File"] == "LICENSE"
    assert told["Requires-Python"] == ">=3.11"
    assert told["Keywords"]
    assert told["Author"]
    classifiers = told.get_all("Classifier", [])
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13, 14)} <= set(classifiers)
    assert told["Description-Content-Type"] == "text/markdown"
    assert len(told.get_payload()) > 1000
    assert not RELATIVE_LINK.search(told.get_payload())


def test_links_of_the_readme_follow_the_repositorys_address() -> None:
    text = "See [models](docs/models.md), [below](#below), [PyPI](https://pypi.org) and ![a picture](docs/a.png)."
    assert with_links(text, "") == "See models, [below](#below), [PyPI](https://pypi.org) and a picture."
    assert with_links(text, "https://example.org/g") == (
        "See [models](https://example.org/g/blob/main/docs/models.md), [below](#below), [PyPI](https://pypi.org) "
        "and ![a picture](https://example.org/g/raw/main/docs/a.png)."
    )


def requirements(name: str) -> Iterator[Requirement]:
    tables = project(name)["project"]
    optional = tables.get("optional-dependencies", {}).values()
    return (Requirement(one) for some in (tables["dependencies"], *optional) for one in some)


@EVERY
def test_every_range_has_a_lowest_version(name: str) -> None:
    for requirement in requirements(name):
        assert {"==", ">="} & {part.operator for part in requirement.specifier}, requirement


def test_the_lock_is_complete_and_fits_the_ranges() -> None:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert "://" not in text
    entries = re.findall(r"^([\w.-]+)(?:\[.*\])?==([^ ;]+)(.*(?:\n    .*)*)", text, flags=re.MULTILINE)
    assert all("--hash=sha256:" in rest for *_, rest in entries)
    locked: dict[str, list[str]] = {}
    for name, version, _ in entries:
        locked.setdefault(canonicalize_name(name), []).append(version)
    groups = project("grating-core")["dependency-groups"]
    group = [one for some in ("test", "model", "dev") for one in groups[some] if isinstance(one, str)]
    ours = {*DISTRIBUTIONS, "torch"}  # torch: see scripts/resolve.sh
    for requirement in [*map(Requirement, group), *(one for name in DISTRIBUTIONS for one in requirements(name))]:
        if requirement.name not in ours:
            versions = locked[canonicalize_name(requirement.name)]
            assert all(requirement.specifier.contains(version) for version in versions), requirement


@pytest.mark.slow
def test_wheels_work_in_an_empty_environment_outside_the_repository(
    wheels: dict[str, Path], tmp_path: Path
) -> None:
    venv.create(tmp_path / "venv", with_pip=False)
    paths = sysconfig.get_paths("venv", {"base": str(tmp_path / "venv"), "platbase": str(tmp_path / "venv")})
    python = Path(paths["scripts"], "python")
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
    ]
    subprocess.run([*command, *map(str, wheels.values())], check=True)
    # Dependencies are those of this environment, but not what is installed here in editable form.
    Path(paths["purelib"], "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    where = "import grating_core, langchain_grating, llama_index.postprocessor.grating as third\n" + "".join(
        f"print({module}.__file__)\n" for module in ("grating_core", "langchain_grating", "third")
    )
    (tmp_path / "examples.py").write_text("\n".join([where, *examples]), encoding="utf-8")

    def run(*command: str | Path) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True, timeout=300
        ).stdout

    lines = run(python, "-I", "examples.py").splitlines()
    assert all(line.startswith(str(tmp_path)) for line in lines[:3])
    assert sum("3,520,031" in line for line in lines) == len(examples)
    command_line = Path(paths["scripts"], "grating")
    assert grating_core.__version__ in run(command_line, "--version")
    assert "grating-core" in run(command_line, "doctor")
