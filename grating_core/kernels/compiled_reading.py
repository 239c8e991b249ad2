"""Reading many pieces of a file at the same time, with threads of the compiled kernels, which need no Python."""

from __future__ import annotations

from ctypes import c_int32, c_int64, c_void_p
from typing import Any

from grating_core.kernels.loading import started
from grating_core.kernels.structs import array_address
from grating_core.memory.pieces import Pieces


class CompiledReading:
    """See :class:`grating_core.kernels.reading.Reading`."""

    def __init__(self, file: int, pieces: Pieces) -> None:
        self._pieces = pieces  # the threads read these arrays and write into their buffer
        self._begun: int | None = None
        begin: Any = started().gk_begin_reading
        begin.restype = c_void_p
        starts, sizes, buffer, places = (c_void_p(array_address(part)) for part in pieces)
        self._begun = begin(c_int32(file), c_int64(len(pieces.starts)), starts, sizes, buffer, places)

    def wait(self) -> int:
        """See :meth:`grating_core.kernels.reading.Reading.wait`. Other threads of Python go on meanwhile."""
        begun, self._begun = self._begun, None
        if begun is None:
            return 0
        end: Any = started().gk_end_reading
        end.restype = c_int64
        return int(end(c_void_p(begun)))

    def __del__(self) -> None:
        self.wait()  # the memory goes when nobody writes into it any more
