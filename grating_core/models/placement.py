"""This module chooses the device that computes, and the dtype."""

from __future__ import annotations

import os

import torch
from threadpoolctl import threadpool_info

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}


def choose_device(device: str | torch.device | None) -> torch.device:
    """Return the device to compute on: the given one, else CUDA, else MPS, else the CPU.

    Raises:
        ValueError: The device is not one of cpu, cuda and mps, or this machine does not have it.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device is None:
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if available[name]))
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        chosen = None
    if chosen is None or chosen.type not in available:
        raise ValueError(f"device={device!r} is unknown; use 'cpu', 'cuda', 'cuda:N', 'mps' or None")
    if not available[chosen.type]:
        present = ", ".join(name for name, there in available.items() if there)
        raise ValueError(f"device={device!r} is not on this machine, which has {present}; use one, or None")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={device!r} does not exist; this machine has {torch.cuda.device_count()}")
    return chosen


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> tuple[torch.dtype, str]:
    """Return the dtype of the layers' products and, in a few words, why it was chosen.

    Raises:
        ValueError: The dtype is not one that grating computes in, or not on this device.
    """
    if isinstance(dtype, str) and dtype == "auto":
        if _has_bfloat16(device):
            return torch.bfloat16, f"the {device.type} processor has bfloat16 instructions"
        return torch.float32, f"no bfloat16 instructions found on the {device.type} processor"
    chosen = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if not isinstance(chosen, torch.dtype) or chosen not in _DTYPES.values():
        raise ValueError(f"dtype={dtype!r} is unknown; use 'auto', {', '.join(map(repr, _DTYPES))}")
    if chosen == torch.int8 and device.type != "cpu":
        raise ValueError(
            f"dtype={dtype!r} is for the CPU, and this model computes on {device}: use device='cpu', or "
            f"dtype='auto'"
        )
    return chosen, "asked for"


def states_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of hidden states, where the layers' products have this dtype."""
    return choose_dtype("auto", device)[0] if dtype == torch.int8 else dtype


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        # x86 calls these instructions AVX512-BF16 or AMX, and ARM has an extension for them.
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def thread_advice() -> str | None:
    """Return advice for processes that share processors; None if there is none.

    torch for Linux computes with GNU's OpenMP, whose threads spin while they wait for each other. If another
    process computes on the same processors, the threads wait long and take its time. OpenMP reads its settings
    when torch is imported, so a library cannot change them.
    """
    if torch.get_num_threads() < 2 or {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        return None
    if not any(pool.get("prefix") == "libgomp" for pool in threadpool_info()):
        return None
    return (
        "where several processes compute, set OMP_WAIT_POLICY=PASSIVE before Python starts: torch's threads spin "
        "while they wait, and each process may take several times as long"
    )
