"""Many pieces of a file, as they are read at a time."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Pieces(NamedTuple):
    """This class holds pieces of a file that are read into a buffer.

    Attributes:
        starts: Offsets of the pieces in the file, int64 ``[n]``.
        sizes: Bytes of the pieces, int64 ``[n]``.
        buffer: The buffer, uint8 ``[bytes]``.
        places: Offsets of the pieces in the buffer, int64 ``[n]``.
    """

    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    buffer: NDArray[np.uint8]
    places: NDArray[np.int64]

    def part(self, which: slice) -> Pieces:
        """Return some of the pieces."""
        return Pieces(self.starts[which], self.sizes[which], self.buffer, self.places[which])

    def view(self, index: int) -> memoryview:
        """Return the memory of one piece."""
        place = int(self.places[index])
        memory: Any = self.buffer[place : place + int(self.sizes[index])]
        return memoryview(memory)
