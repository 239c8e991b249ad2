"""What is picked, and how often."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from grating_core.engine.sampling import Sampler

LOGITS = torch.tensor([1.0, 3.0, -2.0, 2.0, 0.5])
CPU = torch.device("cpu")


def picks(temperature: float, top_p: float = 1.0, seed: int | None = 0, count: int = 4000) -> list[int]:
    sampler = Sampler(temperature, top_p, seed, CPU)
    return [sampler.pick(LOGITS) for _ in range(count)]


def test_temperature_0_takes_the_likeliest() -> None:
    assert set(picks(0, seed=None, count=5)) == set(picks(1e-38, count=5)) == {1}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_come_as_often_as_their_probability_says(temperature: float) -> None:
    shares = torch.bincount(torch.tensor(picks(temperature)), minlength=5) / 4000
    torch.testing.assert_close(shares, (LOGITS / temperature).softmax(-1), atol=0.03, rtol=0)


def test_top_p_leaves_out_what_is_unlikely() -> None:
    # The two likeliest have 0.61 and 0.22 of the probability.
    assert set(picks(1.0, top_p=0.5, count=300)) == {1}
    assert set(picks(1.0, top_p=0.8, count=300)) == {1, 3}


def test_a_seed_gives_the_same_again() -> None:
    assert picks(1.0, seed=7, count=50) == picks(1.0, seed=7, count=50)
    assert len({tuple(picks(1.0, seed=seed, count=50)) for seed in (7, 8, None, None)}) == 4


@given(
    st.integers(0, 2**31), st.integers(1, 3000), st.sampled_from([0.01, 0.3, 1.0, 2.0, 30.0]),
    st.sampled_from([0.01, 0.5, 0.9, 0.999, 1.0]),
)  # fmt: skip
def test_picks_are_those_of_transformers(seed: int, vocabulary: int, temperature: float, top_p: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(vocabulary, generator=generator)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    expected = warpers(None, logits[None]).softmax(-1)
    sampler, random = Sampler(temperature, top_p, seed, CPU), torch.Generator().manual_seed(seed)
    ends = expected[0].double().cumsum(-1)
    for _ in range(5):
        token, number = sampler.pick(logits), float(torch.rand(1, generator=random))
        assert expected[0, token] > 0
        assert ends[token] - expected[0, token] - 1e-5 <= number <= ends[token] + 1e-5
