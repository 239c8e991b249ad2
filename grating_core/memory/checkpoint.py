"""This module finds tensors in safetensors and GGUF files, and reads any part of a file into a given buffer."""

from __future__ import annotations

import hashlib
import os
import stat
import weakref
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grating_core.errors import FileError
from grating_core.forking import Lock
from grating_core.memory.gguf import GgufHeader, parse_gguf
from grating_core.memory.header import LONGEST_HEADER, StoredTensor, parse_header
from grating_core.memory.pages import empty
from grating_core.memory.pieces import Pieces
from grating_core.memory.positioned import fill_from, read_at, read_bytes

SECTOR = 4096  # bytes; O_DIRECT wants addresses, offsets and lengths that are multiples of this at most
SMALL_SECTOR = 512  # bytes; many disks take multiples of this as well
_SAMPLE = 64  # bytes of a sample; samples show whether a checkpoint was replaced
_SAMPLED = 1 << 22  # bytes of a tensor for which one sample is taken


class Checkpoint:
    """A checkpoint reads the safetensors files of one model, or its GGUF file, for several threads at once.

    After a failed read it opens its files again, to find those that came back. A closed one stays closed.

    Args:
        paths: The files; as a mapping, each with what comes before the names of its tensors.
        lasting: Whether the files will be read again and again, and may change meanwhile. Reads of whole sectors
            then bypass the page cache where the file system allows it, because the copy out of the cache takes
            time from computing. The checkpoint also remembers samples of every tensor, and checksums of what was
            read past the cache. If a file's size or times change, these show whether its content is the same.

    Raises:
        FileError: A file cannot be read, or is neither safetensors nor GGUF.
    """

    def __init__(self, paths: Iterable[Path] | Mapping[Path, str], *, lasting: bool = False) -> None:
        self._files: dict[Path, _File] = {}
        self.tensors: dict[str, StoredTensor] = {}
        try:
            for path in paths:
                self._files[path] = file = _File(path, lasting)
                before = paths[path] if isinstance(paths, Mapping) else ""
                named = ((before + name, tensor) for name, tensor in file.tensors.items())
                found = {name: replace(tensor, name=name) for name, tensor in named}
                if repeated := self.tensors.keys() & found.keys():
                    name = min(repeated)
                    raise FileError(f"{name} is both in {self.tensors[name].path} and in {path}")
                self.tensors |= found
        except BaseException:
            self.close()
            raise

    def read(self, tensor: StoredTensor, start: int, buffer: Tensor, *, direct: bool = False) -> None:
        """Fill a buffer with a file's bytes from ``start`` on. Behind the file's end the buffer does not change.

        Args:
            tensor: The tensor whose file is read; messages name it.
            start: Offset of the first byte.
            buffer: uint8 ``[n]`` on the CPU, contiguous.
            direct: Whether to bypass the page cache if possible, with whole sectors.

        Raises:
            FileError: The file is cut short, cannot be read, or was replaced.
        """
        self._files[tensor.path].read(tensor.name, [(start, [_view(buffer)])], direct, remember=direct)

    def descriptor(self, tensor: StoredTensor) -> int:
        """Return the descriptor that reads a file past the page cache if possible; -1 for a closed file."""
        return self._files[tensor.path].descriptor()

    def read_pieces(self, tensor: StoredTensor, pieces: Pieces, begun: Callable[[], int]) -> None:
        """Finish reading pieces of a file, past the page cache if possible.

        Args:
            tensor: The tensor whose file is read; messages name it.
            pieces: The pieces, of whole sectors, see :meth:`sector`.
            begun: :meth:`grating_core.kernels.reading.Reading.wait` of a reading from the :meth:`descriptor`.

        Raises:
            FileError: The file is cut short, cannot be read, or was replaced.
        """
        self._files[tensor.path].read_pieces(tensor.name, pieces, begun)

    def sector(self, tensor: StoredTensor) -> int:
        """Return the bytes of the sectors of the tensor's file, as pieces have them: 512 if the disk takes it."""
        return self._files[tensor.path].sector

    def announce(self, tensor: StoredTensor, ranges: Sequence[tuple[int, int]]) -> None:
        """Tell the system which bytes, as (start, end), will be read next, so that it fetches them all at once."""
        self._files[tensor.path].announce(ranges)

    def changes(self, tensor: StoredTensor) -> int:
        """Return how often a file was found changed. Its content may still be the same."""
        return self._files[tensor.path].changes

    def close(self) -> None:
        """Close the files. Later reads raise FileError."""
        for file in self._files.values():
            file.close()


class _File:
    """This class reads one open file."""

    def __init__(self, path: Path, lasting: bool) -> None:
        self.path = path
        self._lasting = lasting
        self._lock = Lock()
        self._checks: dict[tuple[int, int], int] = {}  # checksums of bytes that were read, by start and length
        self._sure: set[tuple[int, int]] = set()  # the bytes that were checked since the file last changed
        self.changes = 0
        self._closed = False
        self._buffered = _open(path)
        self._direct = _open_direct(path) if lasting else None
        self.sector = _sector(self._direct)
        # A model that nobody holds any more is freed without a call of close.
        self._end = weakref.finalize(self, _close, self._buffered, self._direct)
        try:
            self._look()
        except BaseException:
            self.close()
            raise

    def _look(self) -> None:
        self._identity = _identity(self._buffered)
        self.tensors = _read_header(self.path, self._buffered)
        self._digest = self._fingerprint() if self._lasting else b""
        if self._lasting and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._buffered.fileno(), 0, 0, os.POSIX_FADV_RANDOM)

    def _fingerprint(self) -> bytes:
        size = self._identity[0]
        samples = [(0, min((tensor.start for tensor in self.tensors.values()), default=size))]  # the header
        for tensor in self.tensors.values():
            starts = range(tensor.start, tensor.end, _SAMPLED)
            samples += [(start, min(start + _SAMPLE, tensor.end)) for start in starts]
        self.announce(samples)
        digest = hashlib.blake2b()
        for start, end in samples:
            digest.update(read_bytes(self._buffered, start, end - start, size))
        return digest.digest()

    def read(
        self, name: str, pieces: Sequence[tuple[int, list[memoryview]]], direct: bool, remember: bool = False
    ) -> None:
        def fill(file: FileIO) -> None:
            for start, views in pieces:
                fill_from(file, start, views, self._identity[0])

        self._read(name, fill, direct, lambda: not remember or all(map(self._was_read_before, pieces)))

    def descriptor(self) -> int:
        return -1 if self._closed else (self._direct or self._buffered).fileno()

    def read_pieces(self, name: str, pieces: Pieces, begun: Callable[[], int]) -> None:
        def fill(file: FileIO) -> None:
            for index in range(begun(), len(pieces.starts)):
                fill_from(file, int(pieces.starts[index]), [pieces.view(index)], self._identity[0])

        self._read(name, fill, True, lambda: True)

    def _read(self, name: str, fill: Callable[[FileIO], None], direct: bool, is_right: Callable[[], bool]) -> None:
        cause = "it changes while it is being read"
        for _ in range(2):
            file = (direct and self._direct) or self._buffered
            try:
                fill(file)
                if self._is_as_opened():
                    if not self._lasting or is_right():
                        return
                    cause = "it has changed since it was opened"
                elif not self._lasting:
                    raise FileError(f"{self.path} changed while it was being read")
            except (OSError, EOFError, ValueError) as error:  # ValueError: the file is closed
                cause = str(error)
            self._reopen(name, cause)
        raise FileError(f"{self.path}: reading {name} failed: {cause}")

    def _is_as_opened(self) -> bool:
        """Tell whether the open file still has the same content, even if its name, time or permissions changed."""
        identity = _identity(self._buffered)
        if identity == self._identity:
            return True
        with self._lock:
            if not self._lasting or identity[0] != self._identity[0] or self._fingerprint() != self._digest:
                return False
            self._identity = identity
            self._sure.clear()
            self.changes += 1
        return True

    def _was_read_before(self, piece: tuple[int, list[memoryview]]) -> bool:
        """Tell whether the bytes equal those of the first read of that place. A checksum is computed only once."""
        start, (view,) = piece
        if (place := (start, len(view))) in self._sure:
            return True
        check = zlib.crc32(view[: self._identity[0] - start])
        if self._checks.setdefault(place, check) != check:
            return False
        self._sure.add(place)
        return True

    def _reopen(self, name: str, cause: str) -> None:
        """Open the file again. Its content must be the same as at first."""
        with self._lock:
            if self._closed:
                raise FileError(f"{self.path} has been closed, so {name} cannot be read")
            try:
                twin = _File(self.path, self._lasting)
            except (OSError, FileError) as error:
                raise FileError(
                    f"{self.path}: reading {name} failed ({cause}), and so did opening the file again ({error}). "
                    f"The next call works if the file is back by then"
                ) from error
            with closing(twin):
                if twin._digest != self._digest:
                    raise FileError(
                        f"{self.path} has changed since it was opened, so {name} cannot be read: put the file "
                        f"back, or load the model anew"
                    )
                # Other threads may be reading from these descriptors, which now mean the new file.
                os.dup2(twin._buffered.fileno(), self._buffered.fileno(), inheritable=False)
                if self._direct is not None:
                    os.dup2((twin._direct or twin._buffered).fileno(), self._direct.fileno(), inheritable=False)
                self._identity = twin._identity
                self._sure.clear()
                self.changes += 1

    def announce(self, ranges: Sequence[tuple[int, int]]) -> None:
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError, ValueError):  # reading will raise the error again
                for start, end in ranges:
                    os.posix_fadvise(self._buffered.fileno(), start, end - start, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._end()


def _close(*files: FileIO | None) -> None:
    for file in files:
        if file is not None:
            file.close()


def _open(path: Path, flags: int = 0) -> FileIO:
    """Open a file for reading, and raise ``OSError`` for anything else that may have its name."""
    # Opening must not wait: a named pipe would wait until somebody writes into it.
    flags |= getattr(os, "O_NONBLOCK", 0)
    file = FileIO(path, opener=lambda name, usual: os.open(name, usual | flags))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(f"{path} is not a regular file")
    return file


def _open_direct(path: Path) -> FileIO | None:
    """Open a file past the page cache; return None where the system cannot do so."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        file = _open(path, os.O_DIRECT)
    except OSError:  # some file systems refuse to open, others to read
        return None
    try:
        read_at(file, 0, [_view(aligned_buffer(SECTOR))])
    except OSError:
        file.close()
        return None
    return file


def _sector(file: FileIO | None) -> int:
    """Return the bytes of a sector of the disk of a file, which is None if no read goes past the page cache."""
    if file is not None:
        try:
            read_at(file, SMALL_SECTOR, [_view(aligned_buffer(SECTOR))[SMALL_SECTOR : 2 * SMALL_SECTOR]])
        except OSError:
            return SECTOR
    return SMALL_SECTOR


def _identity(file: FileIO) -> tuple[int, int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns  # nobody can set st_ctime_ns back


def _view(buffer: Tensor) -> memoryview:
    view: Any = buffer.numpy()
    return memoryview(view)


def _read_header(path: Path, file: FileIO) -> dict[str, StoredTensor]:
    size = os.fstat(file.fileno()).st_size
    if path.suffix == ".gguf":
        return _read_gguf(path, file, size).tensors
    try:
        length = int.from_bytes(read_bytes(file, 0, 8, size), "little")
        if length > min(size - 8, LONGEST_HEADER):
            raise ValueError(f"the header would have {length:,} bytes, but the file has only {size:,}")
        return parse_header(read_bytes(file, 8, length, size), path, size)
    except (ValueError, EOFError) as error:
        raise FileError(f"{path} is not safetensors: {error}") from error


def read_gguf_header(path: Path) -> GgufHeader:
    """Return what a GGUF file says before its weights.

    Raises:
        FileError: The file is damaged.
        OSError: The file cannot be read.
    """
    with closing(_open(path)) as file:
        return _read_gguf(path, file, os.fstat(file.fileno()).st_size)


def _read_gguf(path: Path, file: FileIO, size: int) -> GgufHeader:
    try:
        return parse_gguf(lambda start, length: read_bytes(file, start, length, size), path, size)
    except (ValueError, EOFError) as error:
        raise FileError(f"{path} is not GGUF: {error}") from error


def aligned_buffer(size: int, *, pinned: bool = False) -> Tensor:
    """Return a buffer, uint8 ``[size]``, at a whole sector. ``size`` is rounded up to whole sectors."""
    size = whole_sectors(size)
    whole = size + SECTOR
    memory = torch.empty(whole, dtype=torch.uint8, pin_memory=True) if pinned else empty(whole)
    shift = -memory.data_ptr() % SECTOR
    return memory[shift : shift + size]


def whole_sectors(size: int) -> int:
    """Return a number of bytes, rounded up to whole sectors."""
    return -(-size // SECTOR) * SECTOR
