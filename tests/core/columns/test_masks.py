import torch
from hypothesis import given
from hypothesis import strategies as st

from grating_core.columns.masks import keep_largest, kept


@given(size=st.integers(1, 50), share=st.floats(0.001, 1), seed=st.integers(0, 2**31))
def test_the_largest_are_kept_and_the_others_are_zero(size: int, share: float, seed: int) -> None:
    values = torch.randn(3, size, generator=torch.Generator().manual_seed(seed))
    found, count = keep_largest(values, share), kept(size, share)
    for row, original in zip(found.tolist(), values.tolist(), strict=True):
        best = sorted(range(size), key=lambda i: -abs(original[i]))[:count]
        assert row == [value if i in best else 0.0 for i, value in enumerate(original)]


def test_at_least_one_is_kept_and_never_more_than_there_are() -> None:
    assert [kept(10, share) for share in (0.001, 0.26, 0.5, 1.0)] == [1, 3, 5, 10]
