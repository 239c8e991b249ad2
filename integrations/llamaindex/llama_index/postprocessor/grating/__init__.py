"""grating for LlamaIndex: a node postprocessor."""

from llama_index.postprocessor.grating.base import GratingRerank

__all__ = ["GratingRerank"]
