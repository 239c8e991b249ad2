import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from grating_core.kernels.compiled_reading import CompiledReading
from grating_core.kernels.loading import KernelsError, start
from grating_core.kernels.reading import READERS, Reading
from grating_core.memory.pieces import Pieces

pytestmark = pytest.mark.skipif(os.name != "posix", reason="this system has no positioned reads")
Make = Callable[[int, Pieces], Reading | CompiledReading]


@pytest.fixture(params=[Reading, CompiledReading])
def make(request: pytest.FixtureRequest) -> Make:
    if request.param is CompiledReading:
        try:
            start()
        except KernelsError as error:
            pytest.skip(str(error))
    chosen: Make = request.param
    return chosen


@pytest.fixture
def data() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, 200_000, dtype=np.uint8)


@pytest.fixture
def file(tmp_path: Path, data: NDArray[np.uint8]) -> Iterator[int]:
    (tmp_path / "file").write_bytes(data.tobytes())
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def pieces_of(starts: list[int], size: int) -> Pieces:
    count = len(starts)
    buffer = np.zeros(count * size, dtype=np.uint8)
    return Pieces(np.array(starts), np.full(count, size), buffer, np.arange(count)[::-1] * size)


def is_right(pieces: Pieces, data: NDArray[np.uint8], count: int) -> bool:
    return all(
        bytes(pieces.view(n)) == data[pieces.starts[n] :][: pieces.sizes[n]].tobytes() for n in range(count)
    )


@pytest.mark.parametrize("count", [0, 1, 2, READERS + 1, 1000])
def test_all_pieces_come_and_a_second_wait_returns_nothing(
    make: Make, file: int, data: NDArray[np.uint8], count: int
) -> None:
    pieces = pieces_of(np.random.default_rng(count).integers(0, 199_000, count).tolist(), 777)
    reading = make(file, pieces)
    assert reading.wait() == count
    assert is_right(pieces, data, count)
    assert reading.wait() == 0


def test_pieces_behind_the_end_are_missed_from_the_first_on(
    make: Make, file: int, data: NDArray[np.uint8]
) -> None:
    pieces = pieces_of([100, 4000, 199_950, 7], 100)
    assert make(file, pieces).wait() == 2
    assert is_right(pieces, data, 2)
    assert make(-1, pieces_of([0] * 50, 10)).wait() == 0


def test_readings_go_on_side_by_side(make: Make, file: int, data: NDArray[np.uint8]) -> None:
    all_pieces = [pieces_of(list(range(seed, 150_000, 997)), 500) for seed in range(20)]
    readings = [make(file, pieces) for pieces in all_pieces]
    for reading, pieces in reversed(list(zip(readings, all_pieces, strict=True))):
        assert reading.wait() == len(pieces.starts)
        assert is_right(pieces, data, len(pieces.starts))


def test_a_reading_that_nobody_awaits_ends_before_its_memory_goes(make: Make, file: int) -> None:
    for _ in range(50):
        make(file, pieces_of(list(range(0, 150_000, 1000)), 5000))
    gc.collect()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_reads_with_threads_of_its_own(make: Make, file: int, data: NDArray[np.uint8]) -> None:
    pieces = pieces_of(list(range(0, 150_000, 1000)), 5000)
    assert make(file, pieces).wait() == 150
    under_way = make(file, pieces_of(list(range(0, 150_000, 1000)), 5000))
    if (child := os.fork()) == 0:
        again = pieces_of(list(range(0, 150_000, 1000)), 5000)
        right = make(file, again).wait() == 150 and is_right(again, data, 150)
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert under_way.wait() == 150
