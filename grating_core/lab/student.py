"""A student is a pruned model that learns low-rank changes, to predict what the dense model predicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from grating_core.columns.allocation import allocate
from grating_core.columns.masks import kept
from grating_core.lab.masked import MaskedMlp, find_gated_mlp

PARTS = ("gate_proj", "up_proj", "down_proj")
_TOKENS = 1024  # tokens that go through the model together: more take memory and were no faster on a CPU
_POSITIONS = 128  # positions whose logits are in memory together
# A GPU needs more work at once. It gets more tokens and positions, as far as they have no more entries than this.
_PRODUCTS_ON_GPU = 3 << 27  # of the MLPs' products in all layers: 8,700 tokens of SmolLM2-135M, 1,100 of Qwen3-4B
_LOGITS_ON_GPU = 3 << 24


@dataclass(frozen=True)
class Loss:
    """A loss says what pruning costs on a text.

    Attributes:
        perplexity: Perplexity of the pruned model.
        divergence: KL divergence of the pruned model's next tokens from the dense model's, in nats a token.
    """

    perplexity: float
    divergence: float


class LowRankLinear(nn.Module):
    """This layer adds B A to the weight of a linear layer. A and B learn.

    Args:
        base: The linear layer, which is shared and never changed.
        rank: Rank of A and B. Their product is 0 at first.
        chance: Random generator for the first A.
    """

    def __init__(self, base: nn.Linear, rank: int, chance: torch.Generator) -> None:
        super().__init__()
        self.base = base
        device = base.weight.device
        down = (2 * torch.rand(rank, base.in_features, generator=chance) - 1) / math.sqrt(base.in_features)
        self.down = nn.Parameter(down.to(device))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the output of the changed layer."""
        low = functional.linear(hidden, self.down.to(hidden.dtype))
        changed: Tensor = self.base(hidden) + functional.linear(low, self.up.to(hidden.dtype))
        return changed


class LowRankMlp(nn.Module):
    """This class holds the matrices of a gated MLP with their changes. A :class:`MaskedMlp` computes with them.

    Args:
        dense: The dense MLP.
        rank: Rank of each change.
        chance: Random generator for the first A of each change.
    """

    def __init__(self, dense: Any, rank: int, chance: torch.Generator) -> None:
        super().__init__()
        self.act_fn = dense.act_fn
        for part in PARTS:
            self.add_module(part, LowRankLinear(getattr(dense, part), rank, chance))


class TrainedMlp(MaskedMlp):
    """A trained MLP is a :class:`MaskedMlp` that finds its masks several times faster.

    It keeps all entries that are as large as the last one kept. Gradients go through the kept entries, and not
    through the choice.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the MLP's output ``[…, D]`` for an input of the same shape."""
        mlp = self.mlp
        hidden = hidden * _largest(hidden.detach(), self.shares.inputs)
        product = mlp.act_fn(mlp.gate_proj(hidden)) * mlp.up_proj(hidden)
        output: Tensor = mlp.down_proj(product * _largest(product.detach(), self.shares.products))
        return output


def _largest(values: Tensor, share: float) -> Tensor:
    size, count = values.abs(), kept(values.shape[-1], share)
    if values.device.type != "cpu":
        return size >= size.topk(count, sorted=False).values.amin(-1, keepdim=True)
    # Numbers that are not negative have the same order as their bits, and numpy knows no bfloat16.
    bits = size.view(torch.int16 if size.itemsize == 2 else torch.int32)
    place = values.shape[-1] - count
    return bits >= torch.from_numpy(np.partition(bits.numpy(), place)[..., place, None])


class Divergence:
    """This class measures the divergence of a student's next tokens from the teacher's: KL(teacher ‖ student).

    Logits take far more memory than anything else. So they are computed for a few positions at a time, in memory
    that is taken only once, because taking it each time took longer than computing.

    Args:
        head: Function from hidden states ``[N, D]`` to logits ``[N, V]``.
        vocabulary: V, the number of tokens of the vocabulary.
        device: Device of the logits.
    """

    def __init__(self, head: Callable[[Tensor], Tensor], vocabulary: int, device: torch.device) -> None:
        self._head = head
        self._at_once = _POSITIONS if device.type == "cpu" else max(_POSITIONS, _LOGITS_ON_GPU // vocabulary)
        self._room = torch.empty(4, self._at_once, vocabulary, device=device)

    def __call__(self, student: Tensor, teacher: Tensor) -> tuple[float, Tensor]:
        """Return the mean divergence in nats, and its gradient ``[N, D]`` with respect to the student.

        Args:
            student: Last hidden states of the student, ``[N, D]``.
            teacher: Last hidden states of the teacher, ``[N, D]``.
        """
        total, gradients = 0.0, list[Tensor]()
        pairs = zip(torch.split(student.detach(), self._at_once), torch.split(teacher, self._at_once), strict=True)
        for own, other in pairs:
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
        """Return the sum over positions, and its gradient p - q with respect to the student's logits."""
        p, q, p_logits, q_logits = self._room[:, : len(student)]
        p_sum, q_sum = _softmax(student, p_logits, p), _softmax(teacher, q_logits, q)
        apart = q_logits.sub_(p_logits).mul_(q).sum() + (p_sum.log() - q_sum.log()).sum()
        return float(apart), p.sub_(q)


def _softmax(logits: Tensor, shifted: Tensor, probabilities: Tensor) -> Tensor:
    """Fill ``shifted`` and ``probabilities``, and return the sums that the exponentials were divided by."""
    shifted.copy_(logits).sub_(shifted.amax(-1, keepdim=True))
    total = torch.exp(shifted, out=probabilities).sum(-1, keepdim=True)
    probabilities /= total
    return total


class Student:
    """A student is a model in memory that computes either dense, as its own teacher, or pruned and changed.

    Args:
        module: A causal language model of transformers with gated MLPs.
        mlp_density: Share of the MLPs' weights that a token uses.
        rank: Rank of the changes.
        seed: Seed of the first changes.
    """

    def __init__(self, module: Any, mlp_density: float, rank: int, seed: int) -> None:
        self.module = module
        self.layers = module.model.layers
        self.dense = [find_gated_mlp(layer) for layer in self.layers]
        self.shares = allocate(mlp_density, len(self.dense))
        chance = torch.Generator().manual_seed(seed)
        self.adapted = [LowRankMlp(mlp, rank, chance) for mlp in self.dense]
        self.trained = [TrainedMlp(mlp, shares) for mlp, shares in zip(self.adapted, self.shares, strict=True)]
        self.exact = [MaskedMlp(mlp, shares) for mlp, shares in zip(self.adapted, self.shares, strict=True)]
        self._tokens = _TOKENS
        if module.device.type != "cpu":
            products = sum(mlp.down_proj.in_features for mlp in self.dense)
            self._tokens = max(_TOKENS, _PRODUCTS_ON_GPU // products)
        self.divergence = Divergence(self.head, len(module.lm_head.weight), module.device)

    def changes(self) -> dict[str, nn.Parameter]:
        """Return the weights that learn, float32, by PEFT's names."""
        return {
            f"base_model.model.model.layers.{number}.mlp.{part}.{name}.weight": getattr(mlp, part).get_parameter(
                own
            )
            for number, mlp in enumerate(self.adapted)
            for part in PARTS
            for name, own in (("lora_A", "down"), ("lora_B", "up"))
        }

    def head(self, hidden: Tensor) -> Tensor:
        """Return the logits ``[N, V]`` for last hidden states ``[N, D]``."""
        config = self.module.config
        logits: Tensor = self.module.lm_head(hidden) / getattr(config, "logits_scaling", 1.0)  # Granite's
        cap = getattr(config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def hidden(self, mlps: Sequence[nn.Module], ids: Tensor) -> Tensor:
        """Return the last hidden states ``[B T, D]`` for token ids ``[B, T]``, computed with these MLPs."""
        for layer, mlp in zip(self.layers, mlps, strict=True):
            layer.mlp = mlp
        states: Tensor = self.module.model(ids.to(self.module.device), use_cache=False).last_hidden_state
        return states.flatten(0, 1)

    def learn(self, ids: Tensor) -> float:
        """Add the gradients of the mean divergence for token ids ``[B, T]``, and return that divergence."""
        total = 0.0
        for some in torch.split(ids, max(1, self._tokens // ids.shape[1])):
            with torch.no_grad():
                teacher = self.hidden(self.dense, some)
            student = self.hidden(self.trained, some)
            share = len(some) / len(ids)
            divergence, gradient = self.divergence(student, teacher)
            torch.autograd.backward(student, share * gradient)
            total += share * divergence
        return total

    @torch.inference_mode()
    def measure(self, windows: Tensor) -> tuple[float, Loss]:
        """Return the dense model's perplexity on token ids ``[W, T]``, and the loss of the pruned model."""
        dense = pruned = divergence = 0.0
        for ids in windows:
            pairs = (self.hidden(mlps, ids[None])[:-1] for mlps in (self.dense, self.exact))
            teacher, student = (self.head(hidden).float().log_softmax(-1) for hidden in pairs)
            following = ids[1:, None].to(teacher.device)
            dense -= float(teacher.gather(-1, following).mean()) / len(windows)
            pruned -= float(student.gather(-1, following).mean()) / len(windows)
            divergence += float((teacher.exp() * (teacher - student)).sum(-1).mean()) / len(windows)
        return math.exp(dense), Loss(math.exp(pruned), divergence)
