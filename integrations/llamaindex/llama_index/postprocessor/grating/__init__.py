"""grating for LlamaIndex: node postprocessors, and a language model."""

from llama_index.postprocessor.grating.base import GratingRerank
from llama_index.postprocessor.grating.context import GratingContextSelector
from llama_index.postprocessor.grating.llm import GratingLLM

__all__ = ["GratingContextSelector", "GratingLLM", "GratingRerank"]
