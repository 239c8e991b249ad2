"""Memory in large pages, where the system has them.

Whoever reads weights from end to end waits for the addresses of pages as well: on a virtual machine one token took
15 to 25 % less time when its weights lay in pages of 2 MB.
"""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor

_PAGE = 2 << 20  # bytes


def empty(size: int) -> Tensor:
    """Return memory, uint8 ``[size]``, at a cache line; in large pages as far as these are full."""
    whole = size // _PAGE * _PAGE
    if not whole or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    found = torch.frombuffer(memory, dtype=torch.uint8)
    shift = -found.data_ptr() % _PAGE
    with suppress(OSError):  # a kernel without large pages
        memory.madvise(mmap.MADV_HUGEPAGE, shift, whole)
    return found[shift : shift + size]
