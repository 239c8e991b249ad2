"""A loaded cross-encoder as the engine sees it: embed, run one layer, read scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grating_core.models.families import Family


class CrossEncoder:
    """A transformers classification model that is driven one layer at a time.

    Everything runs on a packed token axis without padding: hidden states are ``[1, T, D]`` in the compute
    dtype, where T counts the tokens of all sequences together. The object holds no state of a request, so
    several threads may use it at once.

    Args:
        module: The transformers model, weights bound, in evaluation mode.
        family: The description that fits it.
    """

    def __init__(self, module: Any, family: Family) -> None:
        self._module = module
        self._family = family
        self._layers: list[nn.Module] = list(module.get_submodule(family.layers))
        self._norm = module.get_submodule(family.norm) if family.norm else nn.Identity()
        self.reads_first_token = family.pooling(module.config) == "first"

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self._layers)

    @property
    def device(self) -> torch.device:
        """Where the weights are and the computing happens."""
        return next(self._layers[0].parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype of the layers. The head is float32 whatever this is."""
        return next(self._layers[0].parameters()).dtype

    def embed(self, input_ids: Tensor, token_type_ids: Tensor, positions: Tensor) -> Tensor:
        """Hidden states before the first layer, ``[1, T, D]``, from int64 tensors ``[1, T]``."""
        return self._family.embed(self._module, input_ids, token_type_ids, positions)

    def run_layer(self, number: int, hidden: Tensor, positions: Tensor, **attention: Any) -> Tensor:
        """Put hidden states through one layer.

        Args:
            number: Layer number, from 1 to :attr:`depth`.
            hidden: ``[1, T, D]``.
            positions: int64 ``[1, T]``, counted from 0 within each sequence.
            attention: Handed through to the attention function that the model was built with.

        Returns:
            Hidden states of the same shape.
        """
        layer = self._layers[number - 1]
        arguments = self._family.layer_arguments(self._module, layer, hidden, positions)
        output: Tensor = layer(hidden, attention_mask=None, **arguments, **attention)
        return output

    def read_scores(self, hidden: Tensor, lengths: Sequence[int]) -> Tensor:
        """Relevance scores by the model's own head, in float32 whatever the compute dtype.

        Args:
            hidden: ``[1, T, D]``, after any layer.
            lengths: Tokens of each of the N sequences, T together. A sequence may be cut to its scoring
                position when :attr:`reads_first_token`.

        Returns:
            float32 ``[N]``.
        """
        if self.reads_first_token:
            starts = torch.tensor([0, *lengths[:-1]], device=hidden.device).cumsum(0)
            states = self._norm(hidden[0, starts].float())
        else:
            tokens = self._norm(hidden[0].float())
            states = torch.stack([part.mean(0) for part in tokens.split(list(lengths))])
        return self._family.classify(self._module, states)[:, 0]
