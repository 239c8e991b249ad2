"""Reading many pieces of a file at the same time, with threads of Python."""

from __future__ import annotations

import os
from concurrent.futures import Future

from grating_core.forking import Threads
from grating_core.memory.pieces import Pieces

READERS = 16
"""The most reads at the same time."""

_readers = Threads(READERS, "grating-reading")


class Reading:
    """A reading goes on while its maker does something else. Its memory must stay until :meth:`wait` returns.

    Args:
        file: The descriptor of the file.
        pieces: The pieces to read.
    """

    def __init__(self, file: int, pieces: Pieces) -> None:
        share = max(1, -(-len(pieces.starts) // READERS))
        self._parts: list[tuple[int, Future[int]]] = []
        for start in range(0, len(pieces.starts), share):
            part = pieces.part(slice(start, start + share))
            try:
                self._parts.append((len(part.starts), _readers.submit(_read, file, part)))
            except RuntimeError:  # no thread can be started: who waits reads the rest
                break

    def wait(self) -> int:
        """Wait until nothing is read any more.

        Returns:
            How many pieces were read as a whole, from the first on. A second call returns 0.
        """
        parts, self._parts = self._parts, []
        found = [(count, future.result()) for count, future in parts]
        whole = 0
        for count, read in found:
            whole += read
            if read < count:
                break
        return whole


def _read(file: int, pieces: Pieces) -> int:
    """Read pieces one after another, and return how many were read as a whole before one was not."""
    if not hasattr(os, "preadv"):  # this system has no positioned reads, so only one thread may read
        return 0
    for index in range(len(pieces.starts)):
        view, start = pieces.view(index), int(pieces.starts[index])
        while view:
            try:
                got = os.preadv(file, [view], start)
            except OSError:
                got = 0
            if got == 0:
                return index
            view, start = view[got:], start + got
    return len(pieces.starts)
