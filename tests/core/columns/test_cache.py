from itertools import pairwise

import numpy as np
import pytest

from grating_core.columns.cache import Caching, ColumnCache, Preference
from grating_core.columns.masks import Shares


def random_tokens(columns: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(200, columns)).astype(np.float32)


def test_without_preference_and_cost_the_largest_are_chosen_wherever_they_are() -> None:
    for token in random_tokens(64):
        largest = set(np.argsort(-np.abs(token))[:20].tolist())
        for resident in (0, 10, 64):
            places, hits = ColumnCache(resident).choose(token, 20)
            assert set(places.tolist()) == largest
            assert hits == sum(place < resident for place in largest)
            assert (np.diff(places) > 0).all()


def test_a_preference_raises_the_hits_of_random_choices() -> None:
    shares = []
    for preference in (1.0, 0.5, 0.2):
        cache = ColumnCache(128, preference)
        shares.append(np.mean([cache.choose(token, 128).hits for token in random_tokens(256)]) / 128)
    assert shares[0] == pytest.approx(0.5, abs=0.03)
    assert all(more > less + 0.1 for less, more in pairwise(shares))


def test_dearer_reads_are_fewer_and_longer() -> None:
    runs, lengths = [], []
    for cost in (0.0, 1.0, 4.0):
        missing = [ColumnCache(0, 1.0, cost).choose(token, 128).places for token in random_tokens(256)]
        begun = [1 + int((np.diff(places) > 1).sum()) for places in missing if len(places)]
        runs.append(np.mean(begun))
        lengths.append(sum(map(len, missing)) / sum(begun))
    assert all(more > 1.5 * less for more, less in pairwise(runs))
    assert all(longer > 1.5 * shorter for shorter, longer in pairwise(lengths))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_cache_has_the_room_and_the_preference_of_its_kind(share: float) -> None:
    caching = Caching(share, Preference(0.9, 0.3))
    inputs, products = (caching.cache(1000, kind, Shares(0.5, 0.5), 2.0) for kind in ("inputs", "products"))
    assert (inputs.preference, products.preference) == (0.9, 0.3)
    assert inputs.cost == products.cost == 2.0
    assert (2 * inputs.resident + products.resident) / 3000 == pytest.approx(share, abs=0.001)
    assert products.resident >= inputs.resident
