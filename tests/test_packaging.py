"""What is published: distributions in Python, as wheels and as source, and the kernels beside them."""

import contextlib
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from hatchling import build as backend
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from scikit_build_core import build as kernels_backend

import grating_core
from hatch_build import with_links

ROOT = Path(__file__).parent.parent
DISTRIBUTIONS = {  # where each is, and its package there
    "grating-core": (ROOT, "grating_core"),
    "langchain-grating": (ROOT / "integrations/langchain", "langchain_grating"),
    "llama-index-postprocessor-grating": (ROOT / "integrations/llamaindex", "llama_index/postprocessor/grating"),
    "llama-index-llms-grating": (ROOT / "integrations/llamaindex-llms", "llama_index/llms/grating"),
}
KERNELS = ROOT / "kernels"
FILTER = getattr(tarfile, "data_filter", None)  # Python 3.11 has it since 3.11.4
COMPILED = (".so", ".dylib", ".dll")
IN_SDISTS = {"PKG-INFO", "pyproject.toml", "README.md", "LICENSE", ".gitignore"}  # hatchling always takes the last
ONLY_IN_THE_CORES = {"CHANGELOG.md", "benchmarks", "hatch_build.py", "tests"}
EVERY = pytest.mark.parametrize("name", DISTRIBUTIONS)
RELATIVE_LINK = re.compile(r"\]\((?!https?:|#)")


@pytest.fixture(scope="module")
def sdists(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """As ``pip`` and ``build`` ask for them, by the backend's own functions."""
    output = tmp_path_factory.mktemp("sdists")
    built = {}
    for name, (directory, _) in DISTRIBUTIONS.items():
        with contextlib.chdir(directory):
            built[name] = output / backend.build_sdist(str(output))
    return built


@pytest.fixture(scope="module")
def wheels(sdists: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Built from the source distributions, outside the repository, as whoever builds them does."""
    output = tmp_path_factory.mktemp("wheels")
    built = {}
    for name, sdist in sdists.items():
        with tarfile.open(sdist) as archive:
            archive.extraction_filter = FILTER
            archive.extractall(sources := tmp_path_factory.mktemp("sources"))
        with contextlib.chdir(next(sources.iterdir())):
            built[name] = output / backend.build_wheel(str(output))
    return built


@pytest.fixture(scope="module")
def kernels_sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("kernels")
    with contextlib.chdir(KERNELS):
        return output / kernels_backend.build_sdist(str(output))


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
    directory, package = DISTRIBUTIONS[name]
    kept = (path for path in (directory / package).rglob("*") if path.is_file() and path.suffix != ".pyc")
    assert files == {path.relative_to(directory).as_posix() for path in kept}
    assert f"{package}/py.typed" in files
    assert "llama_index/__init__.py" not in files
    assert name != "grating-core" or any("packaged" in file for file in files)


@EVERY
def test_a_source_distribution_holds_what_building_and_testing_take(name: str, sdists: dict[str, Path]) -> None:
    with tarfile.open(sdists[name]) as archive:
        names = [member.name.split("/", 1)[1] for member in archive.getmembers() if "/" in member.name]
    here = IN_SDISTS | {DISTRIBUTIONS[name][1].split("/")[0]}
    assert {file.split("/")[0] for file in names} == (here | ONLY_IN_THE_CORES if name == "grating-core" else here)
    assert not [file for file in names if "__pycache__" in file or file.endswith((".pyc", ".png", ".ipynb"))]


@EVERY
def test_the_index_is_told_whose_it_is_and_where_it_runs(name: str, wheels: dict[str, Path]) -> None:
    check_metadata(metadata(wheels[name]))


def check_metadata(told: Message) -> None:
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


@EVERY
def test_the_ranges_begin_somewhere_and_an_adapters_core_is_of_its_own_version(
    name: str, wheels: dict[str, Path]
) -> None:
    needed = [Requirement(one) for one in metadata(wheels[name]).get_all("Requires-Dist", [])]
    assert needed
    for requirement in needed:
        assert {"==", ">="} & {part.operator for part in requirement.specifier}, requirement
    major, minor, _ = grating_core.__version__.split(".")
    same = SpecifierSet(f">={grating_core.__version__},<{major}.{int(minor) + 1}")
    core = [requirement.specifier for requirement in needed if requirement.name == "grating-core"]
    assert core == ([] if name == "grating-core" else [same])


def test_the_lock_is_complete_and_fits_the_ranges(wheels: dict[str, Path]) -> None:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert "://" not in text
    entries = re.findall(r"^([\w.-]+)(?:\[.*\])?==([^ ;]+)(.*(?:\n    .*)*)", text, flags=re.MULTILINE)
    assert all("--hash=sha256:" in rest for *_, rest in entries)
    locked: dict[str, list[str]] = {}
    for name, version, _ in entries:
        locked.setdefault(canonicalize_name(name), []).append(version)
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]
    needed = [one for some in ("test", "model", "dev") for one in groups[some] if isinstance(one, str)]
    needed += (one for wheel in wheels.values() for one in metadata(wheel).get_all("Requires-Dist"))
    ours = {*DISTRIBUTIONS, "torch", "ray"}  # torch: see scripts/resolve.sh; ray: too large for every environment
    for requirement in map(Requirement, needed):
        if requirement.name not in ours:
            versions = locked[canonicalize_name(requirement.name)]
            assert all(requirement.specifier.contains(version) for version in versions), requirement


def test_the_kernels_are_published_as_source_that_builds_anywhere(kernels_sdist: Path, tmp_path: Path) -> None:
    with tarfile.open(kernels_sdist) as archive:
        names = {member.name.split("/", 1)[1] for member in archive.getmembers()}
        archive.extraction_filter = FILTER
        archive.extractall(tmp_path)
    (source,) = tmp_path.iterdir()
    kept = {path.relative_to(KERNELS) for path in KERNELS.rglob("*") if path.is_file()}
    built = {path for path in kept if {"build", "__pycache__"} & set(path.parts) or path.suffix in COMPILED}
    assert names == {path.as_posix() for path in kept - built} | {"PKG-INFO"}
    told = Parser().parsestr((source / "PKG-INFO").read_text(encoding="utf-8"))
    assert told["Name"] == "grating-kernels"
    check_metadata(told)
    assert told.get_all("Requires-Dist") is None
    assert (source / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_without_a_compiler_nothing_fails_and_nothing_is_installed(tmp_path: Path) -> None:
    base = tmp_path / "an environment"
    venv.create(base, with_pip=False)
    paths = sysconfig.get_paths("venv", {"base": str(base), "platbase": str(base)})
    Path(paths["purelib"], "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = os.environ | {"CXX": "/bin/false"}
    command = [ROOT / "scripts/install_kernels.sh", base]
    told = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert told.splitlines()[-1].startswith("No C++ compiler: grating computes in torch, more slowly")
    assert not list(tmp_path.rglob("*.whl"))


@pytest.mark.slow
def test_the_kernels_work_in_an_empty_environment(kernels_sdist: Path, tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", tmp_path]
    told = subprocess.run([*build, kernels_sdist], capture_output=True, text=True)
    if "No C++ compiler" in told.stdout + told.stderr:
        pytest.skip("no C++ compiler")
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"grating_kernels-{grating_core.__version__}-py3-none-")  # one for every Python
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (module,) = (name for name in names if name.endswith(COMPILED))
        assert names == {"grating_kernels/__init__.py", "grating_kernels/py.typed", module}
        archive.extractall(tmp_path / "installed")
    smoke = [sys.executable, "-S", KERNELS / "tests/smoke.py"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    assert "levels: " in subprocess.run(smoke, env=environment, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_wheels_work_in_an_empty_environment_outside_the_repository(
    wheels: dict[str, Path], tmp_path: Path
) -> None:
    venv.create(tmp_path / "venv", with_pip=False)
    paths = sysconfig.get_paths("venv", {"base": str(tmp_path / "venv"), "platbase": str(tmp_path / "venv")})
    python = Path(paths["scripts"], "python")
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*command, *wheels.values()], check=True)
    # Dependencies are those of this environment, but not what is installed here in editable form.
    Path(paths["purelib"], "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    packages = [package.replace("/", ".") for _, package in DISTRIBUTIONS.values()]
    where = [f"import {package}\nprint({package}.__file__)" for package in packages]
    (tmp_path / "examples.py").write_text("\n".join([*where, *examples]), encoding="utf-8")

    def run(*command: str | Path) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True, timeout=300
        ).stdout

    lines = run(python, "-I", "examples.py").splitlines()
    assert all(line.startswith(str(tmp_path)) for line in lines[: len(packages)])
    assert sum("3,520,031" in line for line in lines) == len(examples)
    command_line = Path(paths["scripts"], "grating")
    assert grating_core.__version__ in run(command_line, "--version")
    assert "grating-core" in run(command_line, "doctor")
