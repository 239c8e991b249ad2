"""Heads read relevance scores from float32 states: the functions that a family's ``score`` is one of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from grating_core.kernels.activations import ACTIVATIONS
from grating_core.layers.linear import Weights, linear, normed
from grating_core.layers.spec import Norm
from grating_core.models.family import HeadModule, ModelSpec

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Identity": lambda states: states,
    "Tanh": torch.tanh,
    "GELU": functional.gelu,
    "ReLU": torch.relu,
    "SiLU": functional.silu,
    "Sigmoid": torch.sigmoid,
}
"""The activations of modules, by the names of torch's classes."""
_NORM = Norm("layer", 1e-5)  # as torch.nn.LayerNorm computes

# All of these take (spec, weights, states, number): float32 states [N, D] after layer number, to scores [N].


def score_dense(spec: ModelSpec, weights: Weights, states: Tensor, number: int) -> Tensor:
    """Return the scores of a classifier with a dense layer, an activation and perhaps a norm before it."""
    dense = ACTIVATIONS[spec.activation](linear(states, weights, "dense"))
    return spec.labels.score(linear(normed(dense, weights, "norm", spec.norm), weights, "classifier"))


def score_linear(spec: ModelSpec, weights: Weights, states: Tensor, number: int) -> Tensor:
    """Return the scores of a linear classifier."""
    return spec.labels.score(linear(states, weights, "classifier"))


def score_answer(spec: ModelSpec, weights: Weights, states: Tensor, number: int) -> Tensor:
    """Return the logit of yes less the logit of no; that of yes alone if there is no weight for no.

    The weights of ``yes`` and ``no`` are rows ``[1, D]`` of the output embedding.
    """
    yes = softcapped(linear(states, weights, "yes"), spec.softcap)[:, 0]
    if "no.weight" not in weights:
        return yes
    return yes - softcapped(linear(states, weights, "no"), spec.softcap)[:, 0]


def score_layerwise(spec: ModelSpec, weights: Weights, states: Tensor, number: int) -> Tensor:
    """Return the scores of the layer's own head; layers before the first head are read with the first."""
    return linear(states, weights, f"heads.{max(0, number - spec.first_head)}")[:, 0]


def score_modules(spec: ModelSpec, weights: Weights, states: Tensor, number: int) -> Tensor:
    """Return the scores of a head that is made of modules."""
    return _features(spec, weights, states)["scores"][:, 0]


def embed_modules(spec: ModelSpec, weights: Weights, states: Tensor, number: int) -> Tensor:
    """Return the embeddings ``[N, E]`` of a head that is made of modules."""
    return _features(spec, weights, states)["sentence_embedding"]


def _features(spec: ModelSpec, weights: Weights, states: Tensor) -> dict[str, Tensor]:
    """Return what the modules give, by name."""
    features = {"sentence_embedding": states}
    for module in spec.modules:
        features[module.target] = _computed(module, weights, features[module.source])
    return features


def _computed(module: HeadModule, weights: Weights, states: Tensor) -> Tensor:
    """Return what a module makes of the features ``[N, in]`` that it reads."""
    if not module.parts:
        return functional.normalize(states, dim=-1)
    if module.parts == ("norm",):
        return normed(states, weights, f"{module.role}/norm", _NORM)
    output = FUNCTIONS[module.function](linear(states, weights, f"{module.role}/linear"))
    if not module.residual:
        return output
    return output + (linear(states, weights, f"{module.role}/residual") if "residual" in module.parts else states)


def score_first(spec: ModelSpec, weights: Weights, states: Tensor, number: int) -> Tensor:
    """Return the scores of the first of several heads, within a bound; it reads every layer."""
    return softcapped(linear(states, weights, "heads.0"), spec.softcap)[:, 0]


def softcapped(logits: Tensor, bound: float | None) -> Tensor:
    """Return logits that stay within a bound (Gemma 2 has one); the logits themselves if it is None."""
    return logits if bound is None else bound * torch.tanh(logits / bound)
