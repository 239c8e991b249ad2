"""What reads from a disk cost: measured once for a companion file, and kept beside it.

What columns a token uses depends on these costs. Because they are kept, a model gives the same text whenever it is
loaded, however busy the disk is then.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from math import log2
from pathlib import Path

from grating_core.columns.companion import KINDS, Kind
from grating_core.errors import StorageError
from grating_core.files.reading import read_json
from grating_core.files.writing import replace_file
from grating_core.memory.checkpoint import SECTOR

LONGEST_GAP = 64 << 10  # bytes, however slow a disk is at short reads
_LONGEST_REACH = 1 << 26


@dataclass(frozen=True)
class Disk:
    """This class says what reads from a disk cost.

    Attributes:
        inputs: The bytes that the disk reads in the time that one more read of a column of W_u and W_g takes.
        products: The same for columns of W_d.
        reach: The bytes that the disk reads in a millisecond, about.

    Raises:
        ValueError: A number is out of its range.
    """

    inputs: int = 16 << 10
    products: int = 16 << 10
    reach: int = 1 << 20

    def __post_init__(self) -> None:
        if any(type(number) is not int for number in (self.inputs, self.products, self.reach)):
            raise ValueError("not all are whole numbers")
        if not (min(self.gaps) >= 0 and max(self.gaps) <= LONGEST_GAP and 0 < self.reach <= _LONGEST_REACH):
            raise ValueError("a number is out of its range")

    @property
    def gaps(self) -> tuple[int, int]:
        """The bytes for each kind of column, in the order of ``KINDS``."""
        return self.inputs, self.products

    def gap(self, kind: Kind) -> int:
        """Return the bytes for one kind."""
        return self.gaps[KINDS.index(kind)]


def fit_gap(seconds: float, size: int, bandwidth: float) -> int:
    """Return how many bytes a disk reads in the time that one more read takes: 0, or a power of two of sectors.

    Steps so wide make it the same whenever a disk is measured.

    Args:
        seconds: Seconds that one of many short reads takes.
        size: Bytes of such a read.
        bandwidth: Bytes a second of long reads.
    """
    sectors = (seconds * bandwidth - size) / SECTOR
    return 0 if sectors < 0.5 else min(LONGEST_GAP, SECTOR << max(0, round(log2(sectors))))


def fit_reach(bandwidth: float) -> int:
    """Return the bytes that a disk reads in a millisecond, as a power of two; see :func:`fit_gap`."""
    return min(_LONGEST_REACH, 1 << max(0, round(log2(bandwidth / 1000))))


def find_disk(file: Path, measure: Callable[[], Disk]) -> Disk:
    """Return what reads of a file cost: what was measured before, or what is measured now and kept for later.

    Args:
        file: The file. What is kept lies beside it, and counts for the file as it is now and where it is now.
        measure: Function that measures the disk.
    """
    path = file.with_suffix(".json")
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        fields = read_json(path)
        if fields["file"] == _identity(file):
            return Disk(**fields["disk"])
    disk = measure()
    with suppress(StorageError, OSError):  # then it is measured again
        replace_file(path, json.dumps({"file": _identity(file), "disk": asdict(disk)}).encode())
    return disk


def _identity(file: Path) -> list[int]:
    facts = file.stat()
    return [facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns]
