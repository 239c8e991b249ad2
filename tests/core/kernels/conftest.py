"""What tests of kernels have in common."""

from collections.abc import Iterator

import pytest
import torch

from grating_core.kernels.loading import start


@pytest.fixture
def best_level() -> Iterator[None]:
    """Leave the processor's best level and the number of threads as they were."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    start()
