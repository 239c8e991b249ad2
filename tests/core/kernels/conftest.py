"""What tests of kernels have in common."""

from collections.abc import Iterator

import pytest
import torch

from grating_core.kernels.loading import KernelsError, levels, start


@pytest.fixture
def best_level() -> Iterator[None]:
    """Leave the processor's best level and the number of threads as they were."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    start()


def every_level() -> list[object]:
    """The processor's levels, or a skipped one where there are none."""
    try:
        return list(levels())
    except KernelsError as error:
        return [pytest.param("none", marks=pytest.mark.skip(reason=str(error)))]


@pytest.fixture(params=every_level(), scope="module")
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each of the processor's levels in turn, which is started."""
    threads = torch.get_num_threads()
    yield start(request.param)
    torch.set_num_threads(threads)
    start()
