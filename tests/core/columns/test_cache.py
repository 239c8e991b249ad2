from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grating_core.columns.cache import ColumnCache


class Plain:
    """The same cache in a few slow lines: a set, a count, and a sort."""

    def __init__(self, columns: int, capacity: int, preference: float) -> None:
        self.capacity, self.preference = capacity, preference
        self.held: set[int] = set()
        self.uses = dict.fromkeys(range(columns), 0)

    def choose(self, magnitudes: np.ndarray, count: int) -> tuple[set[int], set[int]]:
        """The columns chosen, and those of them that were held."""
        worth = {i: m * (1.0 if i in self.held else self.preference) for i, m in enumerate(magnitudes)}
        chosen = set(sorted(worth, key=lambda i: -worth[i])[:count])
        for column in chosen:
            self.uses[column] += 1
        hits = chosen & self.held
        return chosen, hits


def held(cache: ColumnCache) -> set[int]:
    return set(cache.held()[0].tolist())


@given(
    columns=st.integers(1, 40),
    share=st.floats(0, 1),
    density=st.floats(0.01, 1),
    preference=st.sampled_from([1.0, 0.2, 0.05]),
    seed=st.integers(0, 2**32 - 1),
)
def test_choices_are_those_of_a_plain_cache_and_every_column_lies_where_it_is_said_to(
    columns: int, share: float, density: float, preference: float, seed: int
) -> None:
    chance = np.random.default_rng(seed)
    cache = ColumnCache(columns, round(share * columns), preference=preference)
    plain = Plain(columns, cache.capacity, preference)
    plain.held = set(cache.fill().tolist())
    place = {column: column for column in plain.held}  # where each column lies, as the reader was told
    for _ in range(12):
        count = max(1, round(density * columns))
        chosen, hits = plain.choose(magnitudes := chance.random(columns), count)
        choice = cache.choose(magnitudes, count)
        assert set(choice.columns.tolist()) == chosen
        assert set(choice.columns[: choice.hits].tolist()) == hits
        assert all(place[c] == s for c, s in zip(choice.columns[: choice.hits], choice.slots, strict=False))
        assert len(set(choice.slots.tolist())) == len(choice.slots)
        evicted = plain.held - held(cache)
        assert not evicted & chosen
        # Whoever went was used no more than whoever stayed without being needed now.
        stayed = (plain.held & held(cache)) - chosen
        assert not evicted or not stayed or max(map(plain.uses.get, evicted)) <= min(map(plain.uses.get, stayed))
        beside = choice.slots[choice.slots >= cache.capacity]
        assert sorted(beside.tolist()) == list(range(cache.capacity, cache.capacity + len(beside)))
        assert not len(beside) or held(cache) <= chosen  # only when the cache is full of what is in use
        for column, slot in zip(choice.columns, choice.slots, strict=True):
            if slot < cache.capacity:
                place[int(column)] = int(slot)
        plain.held = held(cache)
        assert len({place[column] for column in plain.held}) == len(plain.held)


def test_frequent_columns_stay_when_others_pass_through() -> None:
    cache = ColumnCache(8, 3)
    frequent = np.array([1.0, 1, 0, 0, 0, 0, 0, 0])
    for _ in range(5):
        cache.choose(frequent, 2)
    for passing in range(2, 8):
        cache.choose(np.eye(8)[passing], 1)
    assert cache.choose(frequent, 2).hits == 2


def test_a_preference_raises_the_hits_of_random_choices() -> None:
    chance = np.random.default_rng(0)
    tokens = np.abs(chance.normal(size=(200, 256)))
    shares = []
    for preference in (1.0, 0.5, 0.2):
        cache = ColumnCache(256, 128, preference=preference)
        cache.fill()
        shares.append(np.mean([cache.choose(token, 128).hits for token in tokens]) / 128)
    assert shares[0] == pytest.approx(0.5, abs=0.03)
    assert all(more > less + 0.1 for less, more in pairwise(shares))


def test_columns_whose_reading_failed_are_not_taken_for_present() -> None:
    cache = ColumnCache(6, 4)
    cache.fill()
    choice = cache.choose(np.array([0, 0, 0, 0, 1.0, 1]), 2)
    cache.forget(choice.columns[choice.hits :])
    assert cache.choose(np.array([0, 0, 0, 0, 1.0, 1]), 2).hits == 0
