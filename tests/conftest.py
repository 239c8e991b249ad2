"""What all tests have in common."""

import gc
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# No deadlines: how long an example takes says more about the machine than about the code. The same examples every
# time, so that a change that did nothing cannot break a run; --hypothesis-profile=fresh looks for more, new ones.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("fixed", derandomize=True, max_examples=50, **_COMMON)
settings.register_profile("fresh", derandomize=False, max_examples=80, print_blob=True, **_COMMON)
settings.load_profile("fixed")


@pytest.fixture
def connections() -> Iterator[None]:
    """Collect at the end what foreign clients leave open, and not in another test."""
    yield
    gc.collect()
