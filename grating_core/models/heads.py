"""Heads read relevance scores from float32 states: the functions that a family's ``score`` is one of."""

from __future__ import annotations

import torch
from torch import Tensor

from grating_core.kernels.activations import ACTIVATIONS
from grating_core.layers.linear import Weights, linear, normed
from grating_core.models.family import ModelSpec

# All of these take (spec, weights, states, number): float32 states [N, D] after layer number, to scores [N].


def score_dense(spec: ModelSpec, weights: Weights, states: Tensor, number: int) -> Tensor:
    """Return the scores of a classifier with a dense layer, an activation and perhaps a norm before it."""
    dense = ACTIVATIONS[spec.activation](linear(states, weights, "dense"))
    return linear(normed(dense, weights, "norm", spec.norm), weights, "classifier")[:, 0]


def score_linear(spec: ModelSpec, weights: Weights, states: Tensor, number: int) -> Tensor:
    """Return the scores of a linear classifier."""
    return linear(states, weights, "classifier")[:, 0]


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


def softcapped(logits: Tensor, bound: float | None) -> Tensor:
    """Return logits that stay within a bound (Gemma 2 has one); the logits themselves if it is None."""
    return logits if bound is None else bound * torch.tanh(logits / bound)
