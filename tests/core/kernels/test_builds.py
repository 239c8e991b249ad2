"""Builds of the kernels: for ARM, under sanitizers, for older processors, and of another version."""

from __future__ import annotations

import platform
import re
import shutil
import signal
from pathlib import Path

import pytest

from grating_core.kernels.loading import VERSION, KernelsError, levels
from tests.core.kernels.building import ROOT, SOURCES, built, needs_compiler, packaged, python, run

FUZZ = ("-m", "pytest", "-p", "no:cacheprovider", str(Path(__file__).parent))


def module(build: Path) -> Path:
    (found,) = (path for path in build.iterdir() if path.stem == "grating_kernels" and path.is_file())
    return found


@pytest.mark.slow
@needs_compiler
def test_the_code_for_arm_passes_the_tests_of_the_kernels(tmp_path):
    """Its instructions are those of tests/emulated, in plain C++."""
    site = packaged(tmp_path, module(built(tmp_path, "-DGRATING_EMULATED_ARM=ON")))
    names = "from grating_core.kernels.loading import levels; print(*levels())"
    assert python(site, "-c", names).stdout.split() == ["neonmm", "neondot", "neon"]
    done = python(site, *FUZZ, "-k", "neon")
    assert not done.returncode, done.stdout
    assert re.search(r"\d+ passed", done.stdout)


OVERFLOW = """
import torch
from grating_core.kernels import compiled
from grating_core.kernels.loading import start
from grating_core.kernels.operands import Then
from grating_core.kernels.packing import packed_weight

start()
weight = packed_weight(torch.randn(33, 65), None, torch.int8)._replace(bias=torch.randn(33))
_, rows = compiled.normed_rows(torch.randn(3, 65), None, output=False, quantized=True)
compiled.linear(rows, weight, Then(torch.float32))
"""


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(platform.system() != "Linux", reason="the sanitizers are loaded as on Linux")
def test_the_kernels_are_clean_under_address_and_undefined_behaviour_sanitizers(tmp_path):
    site = packaged(tmp_path, module(built(tmp_path, "-DGRATING_SANITIZE=ON")))
    libraries = [run("c++", f"-print-file-name=lib{name}.so").strip() for name in ("asan", "ubsan")]
    variables = {"LD_PRELOAD": ":".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
    # A bias that is not padded is read beyond its end: the sanitizer must see it.
    assert "heap-buffer-overflow" in python(site, "-c", OVERFLOW, **variables).stderr
    done = python(site, *FUZZ, "-m", "not slow", **variables)
    assert not done.returncode, done.stdout + done.stderr


ALLOWED = {"dispatch": "", "level_portable": "", "level_avx2": "y", "level_avx2vnni": "y"}
"""The registers wider than 16 bytes that the code of each object may name."""


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(not all(map(shutil.which, ("objdump", "nm"))), reason="objdump or nm is missing")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the levels are those of x86-64")
def test_a_level_has_no_instructions_of_a_higher_one(tmp_path):
    """A function that two objects share would be taken from either; a constructor would run on any processor."""
    objects = {path.name.split(".")[0]: path for path in built(tmp_path).rglob("*.cpp.o")}
    assert set(ALLOWED) < set(objects)
    wide = {}
    for name, path in objects.items():
        code = run("objdump", "-d", "--no-show-raw-insn", str(path))
        wide[name] = set(re.findall(r"%([yzt])mm", code))
        shared = re.findall(r"^.* [WVu] .*$", run("nm", "-C", str(path)), re.MULTILINE)
        assert not shared, (name, shared)
        assert not re.search(r"\.(init_array|ctors)", run("objdump", "-h", str(path))), name
    assert {name: "".join(sorted(wide[name])) for name in ALLOWED} == ALLOWED
    assert "t" in wide["level_amx"]
    assert "z" in wide["level_avx512"]


@pytest.mark.slow
@pytest.mark.skipif(platform.system() != "Linux", reason="memory is guarded as on Linux")
def test_nothing_is_read_beyond_the_operands():
    try:
        every = levels()
    except KernelsError as error:
        pytest.skip(str(error))
    program = str(Path(__file__).with_name("guarded.py"))
    assert python(ROOT, program, "short").returncode == -signal.SIGSEGV
    done = python(ROOT, program)
    assert done.stdout.split() == every, (done.returncode, done.stderr)


OTHER = """
import torch
from grating_core.kernels.choice import kernels

found = kernels()
print(found.level)
print(found.reason)
print(found.linear.__module__)
"""


@needs_compiler
def test_a_module_of_another_version_is_refused_and_torch_computes(tmp_path):
    source, library = tmp_path / "old.c", tmp_path / "grating_kernels.so"
    source.write_text(f"int gk_version(void) {{ return {VERSION + 998}; }}\n")
    run("cc", "-shared", "-fPIC", str(source), "-o", str(library))
    done = python(packaged(tmp_path, library), "-c", OTHER, GRATING_KERNELS="")
    level, reason, computes = done.stdout.splitlines()
    assert level == "None"
    assert reason == (
        f"grating_kernels.so is of version {VERSION + 998}, not {VERSION}: install grating-kernels anew."
    )
    assert computes == "grating_core.kernels.reference"


def test_python_and_c_name_the_same_version():
    assert f"#define GK_VERSION {VERSION}\n" in (SOURCES / "src" / "kernels.h").read_text()
