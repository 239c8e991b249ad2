"""A pruned MLP that learns to do what the dense one does: changes of low rank, and what they minimise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from grating_core.columns.masks import MaskedMlp, kept

PARTS = ("gate_proj", "up_proj", "down_proj")
_AT_ONCE = 128  # positions whose logits are in memory together


class LowRankLinear(nn.Module):
    """A linear layer whose weight is changed by B A, of which A and B learn.

    Args:
        base: Is shared, and stays as it is.
        rank: Of the change, which is 0 at first.
        chance: Where the first A comes from.
    """

    def __init__(self, base: nn.Linear, rank: int, chance: torch.Generator) -> None:
        super().__init__()
        self.base = base
        device = base.weight.device
        down = (2 * torch.rand(rank, base.in_features, generator=chance) - 1) / math.sqrt(base.in_features)
        self.down = nn.Parameter(down.to(device))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, hidden: Tensor) -> Tensor:
        """The output of the changed layer."""
        low = functional.linear(hidden, self.down.to(hidden.dtype))
        changed: Tensor = self.base(hidden) + functional.linear(low, self.up.to(hidden.dtype))
        return changed


class LowRankMlp(nn.Module):
    """The matrices of a gated MLP with their changes, for a :class:`MaskedMlp` to compute with.

    Args:
        dense: The MLP as it is.
        rank: See :class:`LowRankLinear`.
        chance: See there.
    """

    def __init__(self, dense: Any, rank: int, chance: torch.Generator) -> None:
        super().__init__()
        self.act_fn = dense.act_fn
        for part in PARTS:
            self.add_module(part, LowRankLinear(getattr(dense, part), rank, chance))


class TrainedMlp(MaskedMlp):
    """The same, its masks found several times faster: of those as large as the last one kept, all are kept."""

    def forward(self, hidden: Tensor) -> Tensor:
        """See :class:`MaskedMlp`. Which entries are kept has no gradient, what is kept has."""
        mlp = self.mlp
        hidden = hidden * _largest(hidden.detach(), self.shares.inputs)
        product = mlp.act_fn(mlp.gate_proj(hidden)) * mlp.up_proj(hidden)
        output: Tensor = mlp.down_proj(product * _largest(product.detach(), self.shares.products))
        return output


def _largest(values: Tensor, share: float) -> Tensor:
    size, count = values.abs(), kept(values.shape[-1], share)
    if values.device.type != "cpu":
        return size >= size.topk(count, sorted=False).values.amin(-1, keepdim=True)
    # What is not negative has the order of its bits read as a number, and numpy knows no bfloat16.
    bits = size.view(torch.int16 if size.itemsize == 2 else torch.int32)
    place = values.shape[-1] - count
    return bits >= torch.from_numpy(np.partition(bits.numpy(), place)[..., place, None])


class Divergence:
    """How far a student's next tokens are from the teacher's: KL(teacher ‖ student) of their distributions.

    Logits take far more memory than anything else and are only needed to go back at once, so they are made for a
    few positions at a time, in memory that is taken once: to ask the system for it each time took longer than to
    compute with it.

    Args:
        head: ``hidden [N, D] -> logits [N, V]``.
        vocabulary: V.
        device: Where to compute.
    """

    def __init__(self, head: Callable[[Tensor], Tensor], vocabulary: int, device: torch.device) -> None:
        self._head = head
        self._room = torch.empty(4, _AT_ONCE, vocabulary, device=device)

    def __call__(self, student: Tensor, teacher: Tensor) -> tuple[float, Tensor]:
        """The mean over positions, and its gradient.

        Args:
            student: Last hidden states ``[N, D]``.
            teacher: Likewise.

        Returns:
            The divergence, and its gradient with respect to ``student``.
        """
        total, gradients = 0.0, list[Tensor]()
        for own, other in zip(
            torch.split(student.detach(), _AT_ONCE), torch.split(teacher, _AT_ONCE), strict=True
        ):
            own.requires_grad_()
            with torch.enable_grad():
                logits = self._head(own)
            with torch.no_grad():
                divergence, change = self._of_logits(logits, self._head(other))
                change /= len(student)
            total += divergence
            gradients += torch.autograd.grad(logits, own, change.to(logits.dtype))
        return total / len(student), torch.cat(gradients)

    def _of_logits(self, student: Tensor, teacher: Tensor) -> tuple[float, Tensor]:
        """The sum over positions, and its gradient with respect to the student's logits, p - q."""
        p, q, p_logits, q_logits = self._room[:, : len(student)]
        p_sum, q_sum = _softmax(student, p_logits, p), _softmax(teacher, q_logits, q)
        apart = q_logits.sub_(p_logits).mul_(q).sum() + (p_sum.log() - q_sum.log()).sum()
        return float(apart), p.sub_(q)


def _softmax(logits: Tensor, shifted: Tensor, probabilities: Tensor) -> Tensor:
    """Fill both, and return what the exponentials of the shifted logits were divided by."""
    shifted.copy_(logits).sub_(shifted.amax(-1, keepdim=True))
    total = torch.exp(shifted, out=probabilities).sum(-1, keepdim=True)
    probabilities /= total
    return total
