"""grating for LlamaIndex: node postprocessors."""

from llama_index.postprocessor.grating.base import GratingRerank
from llama_index.postprocessor.grating.context import GratingContextSelector

__all__ = ["GratingContextSelector", "GratingRerank"]
