"""A reference for NVIDIA's rerankers in transformers' terms: Llama without the causal mask, pooling, temperature.

Their own code comes with the checkpoints, and is never run here. This follows the published description,
https://github.com/NVIDIA-NeMo/Automodel, components/models/llama_bidirectional/model.py.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
)
from transformers.modeling_outputs import SequenceClassifierOutputWithPast


class LlamaBidirectionalConfig(LlamaConfig):
    model_type = "llama_bidirec"

    pooling: str = "avg"
    temperature: float = 1.0


class LlamaBidirectionalModel(LlamaModel):
    config_class = LlamaBidirectionalConfig

    def __init__(self, config: LlamaBidirectionalConfig) -> None:
        super().__init__(config)
        for layer in self.layers:
            layer.self_attn.is_causal = False


class LlamaBidirectionalForSequenceClassification(LlamaForSequenceClassification):
    config_class = LlamaBidirectionalConfig

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> SequenceClassifierOutputWithPast:
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        seen = attention_mask[:, None, None, :].bool().expand(-1, 1, input_ids.shape[1], -1)
        added = torch.zeros(seen.shape, dtype=self.dtype).masked_fill_(~seen, torch.finfo(self.dtype).min)
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        states = self.model(input_ids, attention_mask=added, position_ids=positions).last_hidden_state
        own = attention_mask[..., None]
        if self.config.pooling == "avg":
            read = (states * own).sum(1) / own.sum(1)
        else:
            first = attention_mask.argmax(1)
            place = first if self.config.pooling == "cls" else first + attention_mask.sum(1) - 1
            read = states[torch.arange(len(states)), place]
        return SequenceClassifierOutputWithPast(logits=self.score(read) / self.config.temperature)


AutoConfig.register("llama_bidirec", LlamaBidirectionalConfig, exist_ok=True)
AutoModel.register(LlamaBidirectionalConfig, LlamaBidirectionalModel, exist_ok=True)
AutoModelForSequenceClassification.register(
    LlamaBidirectionalConfig, LlamaBidirectionalForSequenceClassification, exist_ok=True
)
