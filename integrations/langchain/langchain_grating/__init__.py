"""grating for LangChain: a document compressor, and a cross-encoder for those who have a compressor."""

from langchain_grating.cross_encoder import GratingCrossEncoder
from langchain_grating.rerank import GratingRerank

__all__ = ["GratingCrossEncoder", "GratingRerank"]
