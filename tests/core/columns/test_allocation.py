from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grating_core.columns.allocation import allocate, divide_room
from grating_core.columns.masks import Shares


@given(density=st.floats(0.001, 1), depth=st.integers(1, 60))
def test_the_mean_density_is_the_one_asked_for_and_shares_are_shares(density: float, depth: int) -> None:
    shares = allocate(density, depth)
    assert len(shares) == depth
    assert mean(layer.density for layer in shares) == pytest.approx(density)
    for layer in shares:
        assert 0 < layer.products <= layer.inputs + 1e-12 <= 1 + 1e-9


@given(depth=st.integers(1, 60), low=st.floats(0.01, 1), high=st.floats(0.01, 1))
def test_a_higher_density_keeps_no_less_anywhere(depth: int, low: float, high: float) -> None:
    low, high = sorted((low, high))
    for less, more in zip(allocate(low, depth), allocate(high, depth), strict=True):
        assert less.inputs <= more.inputs + 1e-12
        assert less.products <= more.products + 1e-12


def test_a_density_of_one_keeps_everything() -> None:
    assert all((layer.inputs, layer.products) == pytest.approx((1, 1)) for layer in allocate(1.0, 12))


def test_inputs_and_the_first_layer_get_more() -> None:
    first, *others = allocate(0.5, 12)
    assert first.density > others[0].density
    assert all(layer.inputs > layer.products for layer in (first, *others))


@given(share=st.floats(0, 1), inputs=st.floats(0.05, 1), products=st.floats(0.05, 1))
def test_room_is_used_up_and_products_come_first(share: float, inputs: float, products: float) -> None:
    shares = Shares(inputs, products)
    room = divide_room(share, shares)
    assert room.density == pytest.approx(share)
    assert 0 <= room.inputs <= 1 + 1e-9
    assert 0 <= room.products <= 1 + 1e-9
    assert room.inputs == pytest.approx(0) or room.products >= min(1, products) - 1e-9
