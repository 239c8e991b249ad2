"""The language model."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any

from llama_index.core.base.llms.generic_utils import (
    astream_completion_response_to_chat_response,
    completion_response_to_chat_response,
    messages_to_prompt,
    stream_completion_response_to_chat_response,
)
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
    TextBlock,
)
from llama_index.core.llms import CustomLLM
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback

from grating_core import GratingError, StreamedCausalLM
from grating_core.forking import run_in_thread
from grating_core.frameworks.language_models import LanguageModelFields, pieces
from grating_core.results import Generation

Prompt = str | list[dict[str, str]]  # a text to continue, or messages
_ROLES = (MessageRole.SYSTEM, MessageRole.USER, MessageRole.ASSISTANT)


class GratingLLM(LanguageModelFields, CustomLLM):  # type: ignore[misc]
    """This language model runs on this machine; weights that do not fit into memory are read from disk.

    It is loaded on first use, and shared with whoever uses the same model and settings. Requests to one model are
    answered one after the other; streams go on beside them. ``complete`` continues a text as it is; ``chat``,
    which engines use, asks through the model's chat template. Messages are texts: neither tools nor images.

    Example:
        .. code-block:: python

            llm = GratingLLM(model="HuggingFaceTB/SmolLM2-135M-Instruct", max_tokens=100)
            engine = index.as_query_engine(llm=llm, node_postprocessors=[reranker])
    """

    never_pickled = ("token", "callback_manager")  # those who listen are in this process

    @classmethod
    def class_name(cls) -> str:
        """Return the name that LlamaIndex serialises it under."""
        return "GratingLLM"

    @property
    def metadata(self) -> LLMMetadata:
        """The sizes that LlamaIndex packs prompts by; asking for them loads the model.

        It counts tokens by another tokenizer, and not those of the chat template, so a quarter is kept back.
        """
        return LLMMetadata(
            context_window=(window := self.llm.max_length * 3 // 4),
            num_output=min(self.max_tokens, window // 2),
            is_chat_model=True,
            model_name=self.model,
        )

    def to_payload(self) -> dict[str, Any]:
        """Return the settings for those who listen. Unlike :attr:`metadata` they do not need the model."""
        return {**self.to_dict(), "model_name": self.model}

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Continue a text.

        Args:
            prompt: The text.
            formatted: Whether ``completion_to_prompt`` has been applied to it.
            kwargs: Settings of the request, instead of the object's.
        """
        return self._answered(self._text(prompt, formatted), kwargs)

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """:meth:`complete`, piece by piece."""
        return self._streamed(self.llm, self._text(prompt, formatted), kwargs)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """:meth:`complete` without blocking the event loop; cancelled, it stops computing."""
        return await self._aanswered(self._text(prompt, formatted), kwargs)

    @llm_completion_callback()
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseAsyncGen:
        """:meth:`stream_complete` without blocking the event loop; closed or cancelled, it stops computing."""
        return _in_threads(self._streamed(await self._allm(), self._text(prompt, formatted), kwargs))

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer the last message.

        Args:
            messages: Texts of system, user and assistant.
            kwargs: Settings of the request, instead of the object's.
        """
        return completion_response_to_chat_response(self._answered(self._prompt(messages), kwargs))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """:meth:`chat`, piece by piece."""
        answer = self._streamed(self.llm, self._prompt(messages), kwargs)
        return stream_completion_response_to_chat_response(answer)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """:meth:`chat` without blocking the event loop; cancelled, it stops computing."""
        return completion_response_to_chat_response(await self._aanswered(self._prompt(messages), kwargs))

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """:meth:`stream_chat` without blocking the event loop; closed or cancelled, it stops computing."""
        answer = self._streamed(await self._allm(), self._prompt(messages), kwargs)
        return astream_completion_response_to_chat_response(_in_threads(answer))

    def _answered(self, prompt: Prompt, given: Mapping[str, Any]) -> CompletionResponse:
        return _response(self.llm.generate(prompt, **self._request(self.llm, prompt, given)))

    async def _aanswered(self, prompt: Prompt, given: Mapping[str, Any]) -> CompletionResponse:
        llm = await self._allm()
        return _response(await llm.agenerate(prompt, **self._request(llm, prompt, given)))

    def _streamed(self, llm: StreamedCausalLM, prompt: Prompt, given: Mapping[str, Any]) -> CompletionResponseGen:
        return _responses(llm.stream(prompt, **self._request(llm, prompt, given)))

    def _request(self, llm: StreamedCausalLM, prompt: Prompt, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of an answer, no longer than there is room for."""
        answer = self._answer(given)
        return {**answer, "max_new_tokens": min(answer["max_new_tokens"], _room(llm, prompt))}

    def _text(self, prompt: str, formatted: bool) -> str:
        return prompt if formatted else self.completion_to_prompt(prompt)  # type: ignore[misc]  # never None

    def _prompt(self, messages: Sequence[ChatMessage]) -> Prompt:
        if self.messages_to_prompt not in (None, messages_to_prompt):  # somebody's own
            return self.messages_to_prompt(messages)
        return [_as_message(index, message) for index, message in enumerate(messages)]


def _room(llm: StreamedCausalLM, prompt: Prompt) -> int:
    """Return how many tokens the answer to a prompt may have."""
    # Engines take a ValueError for an answer that cannot be parsed, and say "Empty Response" instead of it.
    try:
        room = llm.room(prompt)
    except ValueError as error:
        raise GratingError(str(error)) from error
    if room < 1:
        raise GratingError(
            f"prompt has {llm.max_length - room:,} tokens, which leaves no room for an answer within "
            f"max_length={llm.max_length}: shorten it, or take smaller chunks or fewer nodes"
        )
    return room


def _response(generation: Generation) -> CompletionResponse:
    """Return the text and what is known of it, with the tokens where LlamaIndex counts them."""
    usage = {
        "prompt_tokens": generation.prompt_tokens,
        "completion_tokens": generation.new_tokens,
        "total_tokens": generation.prompt_tokens + generation.new_tokens,
    }
    return CompletionResponse(
        text=generation.text, raw={"finish_reason": generation.finish_reason, "usage": usage}
    )


def _responses(stream: Generator[str, None, Generation]) -> CompletionResponseGen:
    """Yield the text so far with each new piece, and at last what is known of it."""
    text = ""
    for piece in pieces(stream):
        if isinstance(piece, Generation):
            yield _response(piece).model_copy(update={"delta": ""})
        else:
            text += piece
            yield CompletionResponse(text=text, delta=piece)


async def _in_threads(responses: CompletionResponseGen) -> CompletionResponseAsyncGen:
    """Yield the same, each computed in a worker thread, so that the event loop goes on."""
    while (response := await run_in_thread(next, responses, None)) is not None:
        yield response


def _as_message(index: int, message: ChatMessage) -> dict[str, str]:
    if message.role not in _ROLES:
        raise ValueError(
            f"messages[{index}] has the role {message.role.value!r}: there are no tools; use system, user or "
            f"assistant"
        )
    # What a model thought before it answered is left out, as chat templates do. Older versions have no such block.
    said = [block for block in message.blocks if block.block_type != "thinking"]
    if others := [block for block in said if not isinstance(block, TextBlock)]:
        raise ValueError(f"messages[{index}] has a {type(others[0]).__name__}, but only text can be read")
    return {"role": message.role.value, "content": message.content or ""}
