"""grating for LlamaIndex: a language model that may be larger than memory."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_index.llms.grating.base import GratingLLM

__all__ = ["GratingLLM"]


def __getattr__(name: str) -> Any:
    if name == "GratingLLM":  # on first use: it brings in torch and LlamaIndex's own modules
        from llama_index.llms.grating.base import GratingLLM

        return GratingLLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
