"""The compiled features of a lens against those in torch: made-up sequences, faulty states, every level."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grating_core.kernels import compiled, features
from grating_core.kernels.loading import KernelsError, levels, start
from grating_core.kernels.operands import Texts

try:
    LEVELS = levels()
except KernelsError as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.usefixtures("best_level")


@st.composite
def calls(draw):
    """Draw sequences whose texts lie in a prefix, behind it, or in both; tensors come from the seed.

    With a width of 1 all cosines would be 1 or -1, and rounding would say which token is the most similar.
    """
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dtype, width = (
        draw(st.sampled_from([torch.bfloat16, torch.float32])),
        draw(st.sampled_from([3, 15, 16, 33, 64, 100])),
    )
    shared, asked = draw(st.sampled_from([0, 0, 1, 7])), draw(st.sampled_from([0, 1, 5, 17, 33]))
    first = draw(st.integers(0, shared + 1))
    sequences, end = [], 0
    for _ in range(draw(st.integers(1, 4))):
        told, gap = draw(st.sampled_from([0, 1, 2, 31, 32, 33, 70])), draw(st.integers(0, 2))
        texts = first, first + asked, first + asked + gap, first + asked + gap + told
        if draw(st.booleans()):  # the document comes first
            texts = first + told + gap, first + told + gap + asked, first, first + told
        length = max(1, max(texts) + 1 - shared)
        sequences.append(Texts(end, length, *texts, shared))
        end += length
    return torch.randn(shared, width).to(dtype), torch.randn(end, width).to(dtype), sequences


@given(calls(), st.sampled_from(["first", "last", "mean"]), st.booleans())
@settings(max_examples=100, deadline=None)
def test_the_features_are_those_in_torch(call, pooling, similarities):
    expected = features.features(*call, pooling, similarities=similarities)
    for level in LEVELS:
        start(level)
        found = compiled.features(*call, pooling, similarities=similarities)
        torch.testing.assert_close(
            found, expected, rtol=1e-4, atol=1e-5, msg=lambda text, level=level: f"{level}: {text}"
        )


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_sequence_has_the_same_bits_whatever_comes_along(level, threads):
    torch.manual_seed(0)
    start(level)
    torch.set_num_threads(threads)
    states, none = torch.randn(200, 48).bfloat16(), torch.empty(0, 48).bfloat16()
    sequences = [Texts(first, 50, 0, 9, 9, 50) for first in (0, 50, 100, 150)]
    together = compiled.features(none, states, sequences, "mean", similarities=True)
    for one, alone in zip(sequences, together, strict=True):
        assert torch.equal(compiled.features(none, states, [one], "mean", similarities=True)[0], alone)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("fault", [torch.nan, torch.inf, -torch.inf])
def test_a_faulty_state_shows_in_the_features_of_its_sequence_alone(level, fault):
    torch.manual_seed(0)
    start(level)
    states, none = torch.randn(40, 32), torch.empty(0, 32)
    states[30, 3] = fault
    sequences = [Texts(first, 20, 0, 5, 5, 20) for first in (0, 20)]
    found = compiled.features(none, states, sequences, "first", similarities=True)
    assert found[0].isfinite().all()
    assert not found[1].isfinite().all()


@pytest.mark.parametrize("level", LEVELS)
def test_states_of_zeros_are_similar_to_nothing(level):
    start(level)
    states, none = torch.zeros(8, 16), torch.empty(0, 16)
    one = Texts(0, 8, 0, 3, 3, 8)
    found = compiled.features(none, states, [one], "mean", similarities=True)
    torch.testing.assert_close(found, features.features(none, states, [one], "mean", similarities=True))
