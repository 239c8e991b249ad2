"""Reads at a place of a file, which leave the file's position as it is."""

from __future__ import annotations

import os
from io import FileIO

from grating_core.forking import Lock


def read_at(file: FileIO, start: int, views: list[memoryview]) -> int:
    """Read from a place in a file into views, and return the number of bytes, which may be fewer than fit.

    The file's position, which a forked process shares, does not change on systems with positioned reads.
    """
    if hasattr(os, "preadv"):
        return os.preadv(file.fileno(), views, start)
    with _seeking:  # this system has no positioned reads
        file.seek(start)
        return file.readinto(views[0]) or 0


_seeking = Lock()


def fill_from(file: FileIO, start: int, views: list[memoryview], size: int) -> None:
    """Read into one view after another, until all are full or ``size`` bytes, the whole file, are read."""
    while any(views) and start < size:
        got = read_at(file, start, views)
        if got == 0:
            raise EOFError(f"it was {size:,} bytes long and now ends at byte {start:,}")
        start += got
        while views and got >= len(views[0]):
            got -= len(views[0])
            views = views[1:]
        if got:
            views = [views[0][got:], *views[1:]]


def read_bytes(file: FileIO, start: int, length: int, size: int) -> bytes:
    """Read ``length`` bytes from ``start`` on, or up to ``size`` bytes, the whole file."""
    data = bytearray(length)
    fill_from(file, start, [memoryview(data)], size)
    return bytes(data)
