import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from grating_core.kernels.activations import ACTIVATIONS


def states(*shape: int, dtype: torch.dtype) -> Tensor:
    return (3 * torch.randn(shape)).to(dtype)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_activations_are_those_of_transformers_and_work_in_place(
    name: str, dtype: torch.dtype, tolerance: float
) -> None:
    for shape in [(1, 1), (7, 48), (300, 33)]:
        given = states(*shape, dtype=dtype)
        expected = ACT2FN[name](given.clone())
        found = ACTIVATIONS[name](given)
        assert found.data_ptr() == given.data_ptr()
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_half_of_a_product_can_be_activated_alone() -> None:
    for name, act in ACTIVATIONS.items():
        both = states(9, 20, dtype=torch.float32)
        expected = torch.cat((both[:, :10], ACT2FN[name](both[:, 10:].clone())), dim=1)
        act(both[:, 10:])
        torch.testing.assert_close(both, expected, atol=1e-6, rtol=1e-6, msg=name)
