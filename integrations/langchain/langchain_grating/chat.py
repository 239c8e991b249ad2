"""The chat model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.language_models.base import LangSmithParams
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, SystemMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from pydantic import ConfigDict
from typing_extensions import override

from grating_core.forking import run_in_thread
from grating_core.frameworks.language_models import LanguageModelFields, pieces
from grating_core.results import Generation
from grating_core.text.messages import REASONING
from langchain_grating.settings import Written

_ROLES: dict[type[BaseMessage], str] = {SystemMessage: "system", HumanMessage: "user", AIMessage: "assistant"}


class ChatGrating(LanguageModelFields, Written, BaseChatModel):  # type: ignore[misc]
    """This language model runs on this machine; weights that do not fit into memory are read from disk.

    It is loaded on first use, and shared with whoever uses the same model and settings. Requests to one model are
    answered one after the other; streams go on beside them. Messages are texts: neither tools nor images.

    What LangChain's chat models usually take and only a service needs (``api_key``, ``timeout``, ``max_retries``,
    ``streaming``) is accepted and does nothing.

    Example:
        .. code-block:: python

            llm = ChatGrating(model="HuggingFaceTB/SmolLM2-135M-Instruct", max_tokens=100)
            chain = prompt | llm | StrOutputParser()
    """

    model_config = ConfigDict(extra="forbid")
    ignored_arguments = ("api_key", "max_retries", "streaming", "timeout")

    @property
    @override
    def _llm_type(self) -> str:
        return "grating"

    @property
    @override
    def _identifying_params(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in LanguageModelFields.model_fields if name != "token"}

    @override
    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return super()._get_ls_params(stop or self.stop, **kwargs)

    @override
    def get_num_tokens(self, text: str) -> int:
        """Return how many tokens the model's tokenizer makes of a text, without special tokens."""
        return self.llm.count_tokens(text)

    @override
    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return self._result(self.llm.generate(_as_prompt(messages), **self._answer({**kwargs, "stop": stop})))

    @override
    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        llm = await self._allm()
        return self._result(await llm.agenerate(_as_prompt(messages), **self._answer({**kwargs, "stop": stop})))

    @override
    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        for piece in pieces(self.llm.stream(_as_prompt(messages), **self._answer({**kwargs, "stop": stop}))):
            if isinstance(piece, Generation):
                last = AIMessageChunk(content="", chunk_position="last", **self._known(piece))
                yield ChatGenerationChunk(message=last)
                return
            chunk = ChatGenerationChunk(message=AIMessageChunk(content=piece))
            if run_manager:
                run_manager.on_llm_new_token(piece, chunk=chunk)
            yield chunk

    @override
    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        chunks = self._stream(messages, stop, run_manager.get_sync() if run_manager else None, **kwargs)
        while (chunk := await run_in_thread(next, chunks, None)) is not None:
            yield chunk

    def _result(self, generation: Generation) -> ChatResult:
        message = AIMessage(generation.text, **self._known(generation))
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _known(self, generation: Generation) -> dict[str, Any]:
        """Return what a message says of how it came about."""
        return {
            "response_metadata": {"finish_reason": generation.finish_reason, "model_name": self.model},
            "usage_metadata": UsageMetadata(
                input_tokens=generation.prompt_tokens,
                output_tokens=generation.new_tokens,
                total_tokens=generation.prompt_tokens + generation.new_tokens,
            ),
        }


def _as_prompt(messages: Sequence[BaseMessage]) -> list[dict[str, str]]:
    return [
        {"role": _role(index, message), "content": _text(index, message)} for index, message in enumerate(messages)
    ]


def _role(index: int, message: BaseMessage) -> str:
    for kind, role in _ROLES.items():
        if isinstance(message, kind):
            return role
    raise ValueError(
        f"messages[{index}] is a {type(message).__name__}: there are no tools; use SystemMessage, HumanMessage or "
        f"AIMessage"
    )


def _text(index: int, message: BaseMessage) -> str:
    for block in message.content_blocks:
        kind = block["value"].get("type") if block["type"] == "non_standard" else block["type"]
        if kind != "text" and kind not in REASONING:
            raise ValueError(f"messages[{index}] has content of type {kind!r}, but only text can be read")
    return str(message.text)
