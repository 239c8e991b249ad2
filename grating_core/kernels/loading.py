"""Loading the compiled module of the distribution grating-kernels, and choosing the instructions."""

from __future__ import annotations

import ctypes
import sys
from ctypes import c_char_p, c_int32, c_void_p
from importlib import import_module
from pathlib import Path

import torch

VERSION = 11
"""The version of the C interface, as kernels/src/kernels.h has it."""

DTYPES = {torch.int8: 0, torch.bfloat16: 1, torch.float32: 2}
"""The numbers that the C interface has for dtypes."""


class KernelsError(RuntimeError):
    """The compiled module cannot be used; the message says why, in one sentence."""


_lib: ctypes.CDLL | None = None


def start(level: str | None = None) -> str:
    """Load the compiled module and choose the instructions.

    Args:
        level: The name of a level of :func:`levels`; None for the best that this processor has.

    Returns:
        The name of the level that was chosen.

    Raises:
        KernelsError: The module is not built, is of another version, or the processor lacks the level.
    """
    global _lib
    lib = _lib or _load()
    pool = ctypes.cast(_torch().torch_parallel_for, c_void_p)
    lib.gk_start.restype = c_char_p
    lib.gk_start.argtypes = [c_void_p, c_int32, c_char_p]
    chosen = lib.gk_start(pool, torch.get_num_threads(), level.encode() if level is not None else None)
    if chosen is None:
        raise KernelsError(f"This processor has no level {level!r} of the kernels; it has {', '.join(levels())}.")
    _lib = lib
    return str(chosen.decode())


def levels() -> list[str]:
    """Return the names of the levels that this processor has, the best first.

    Raises:
        KernelsError: The module is not built, or is of another version.
    """
    lib = _lib or _load()
    names = ctypes.create_string_buffer(256)
    lib.gk_levels(names, c_int32(256))
    return names.value.decode().split()


def has(dtype: torch.dtype) -> bool:
    """Tell whether the chosen level has products of this dtype: int8, bfloat16 or float32."""
    return dtype in DTYPES and bool(started().gk_has(c_int32(DTYPES[dtype])))


def _load() -> ctypes.CDLL:
    try:
        grating_kernels = import_module("grating_kernels")
    except ImportError:
        raise KernelsError(
            "grating-kernels is not installed: in a clone of grating, pip install ./kernels builds it."
        ) from None
    try:
        path = grating_kernels.library()
        lib = ctypes.CDLL(str(path))
        version = int(lib.gk_version())
    except (OSError, AttributeError) as error:
        raise KernelsError(f"The module of grating-kernels cannot be loaded: {error}") from error
    if version != VERSION:
        raise KernelsError(f"{path.name} is of version {version}, not {VERSION}: install grating-kernels anew.")
    return lib


def _torch() -> ctypes.CDLL:
    name = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}.get(sys.platform, "libtorch_cpu.so")
    try:
        lib = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
        lib.torch_parallel_for  # noqa: B018
    except (OSError, AttributeError) as error:
        raise KernelsError(f"torch {torch.__version__} lends no threads: {error}") from error
    return lib


def started() -> ctypes.CDLL:
    """Return the module after it was told how many threads torch has now.

    Raises:
        KernelsError: :func:`start` was not called.
    """
    if _lib is None:
        raise KernelsError("The kernels were not started.")
    _lib.gk_threads(c_int32(torch.get_num_threads()))
    return _lib
