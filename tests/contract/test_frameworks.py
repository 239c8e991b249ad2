"""What the adapters rely on in LangChain, LangGraph and LlamaIndex."""

import inspect

import pytest
from langchain_core.callbacks import CallbackManagerForLLMRun, Callbacks
from langchain_core.cross_encoders import BaseCrossEncoder
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.language_models import BaseChatModel
from langchain_core.language_models.base import LangSmithParams
from langchain_core.load.serializable import Serializable
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import RunnableLambda, run_in_executor
from langgraph.store.base import BaseStore, GetOp, Item, SearchItem, SearchOp, get_text_at_path
from llama_index.core.base.llms.types import ChatMessage, LLMMetadata, ThinkingBlock
from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.callbacks import CBEventType, EventPayload
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.llms import CustomLLM
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeRelationship, NodeWithScore, QueryBundle, TextNode


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def test_langchains_base_classes_ask_for_these_methods() -> None:
    assert BaseCrossEncoder.__abstractmethods__ == {"score"}
    assert BaseDocumentCompressor.__abstractmethods__ == {"compress_documents"}
    assert parameters(BaseDocumentCompressor.compress_documents) == ["self", "documents", "query", "callbacks"]
    assert {"_generate", "_llm_type"} <= BaseChatModel.__abstractmethods__
    assert parameters(BaseChatModel._generate)[:4] == ["self", "messages", "stop", "run_manager"]
    assert parameters(BaseChatModel._stream)[:4] == ["self", "messages", "stop", "run_manager"]
    assert hasattr(BaseChatModel, "_get_ls_params")
    assert {"ls_model_name", "ls_provider"} <= set(LangSmithParams.__annotations__)
    assert {"input_tokens", "output_tokens", "total_tokens"} <= set(UsageMetadata.__annotations__)
    assert {"is_lc_serializable", "get_lc_namespace", "lc_attributes"} <= set(dir(Serializable))
    assert ChatResult.model_fields.keys() >= {"generations", "llm_output"}
    assert issubclass(ChatGenerationChunk, ChatGeneration)
    assert hasattr(CallbackManagerForLLMRun, "on_llm_new_token")
    assert Callbacks is not None


async def test_langchains_runnables_make_runs_of_functions() -> None:
    assert await RunnableLambda(lambda number: number + 1).ainvoke(1) == 2
    assert await run_in_executor(None, max, 1, 2) == 2
    assert Document("text", metadata={"a": 1}, id="1").model_copy(update={"metadata": {}}).id == "1"


def test_langgraphs_stores_work_by_operations() -> None:
    assert BaseStore.__abstractmethods__ == {"batch", "abatch"}
    assert SearchOp(("a",), query="q", limit=1)._replace(limit=2).limit == 2
    assert GetOp(("a",), "key").namespace == ("a",)
    assert get_text_at_path({"messages": [{"content": "one"}]}, "messages[*].content") == ["one"]
    assert issubclass(SearchItem, Item)
    assert "score" in parameters(SearchItem)


def test_llamaindexs_base_classes_ask_for_these_methods() -> None:
    assert "_postprocess_nodes" in BaseNodePostprocessor.__abstractmethods__
    assert parameters(BaseNodePostprocessor._postprocess_nodes) == ["self", "nodes", "query_bundle"]
    assert hasattr(BaseNodePostprocessor, "apostprocess_nodes")
    assert CustomLLM.__abstractmethods__ >= {"complete", "stream_complete", "metadata"}
    assert issubclass(CustomLLM, BaseModel)
    assert LLMMetadata(context_window=5, num_output=1, model_name="m", is_chat_model=True).context_window == 5
    assert callable(llm_chat_callback())
    assert callable(llm_completion_callback())


def test_llamaindexs_nodes_and_messages_have_these_parts() -> None:
    node = TextNode(text="text", metadata={"a": 1}, excluded_embed_metadata_keys=["a"])
    assert node.get_content(metadata_mode=MetadataMode.EMBED) == "text"
    assert NodeWithScore(node=node, score=0.5).node.relationships.get(NodeRelationship.PREVIOUS) is None
    assert QueryBundle("q").query_str == "q"
    assert ChatMessage(role="user", content="Hello").content == "Hello"
    assert ThinkingBlock(content="Hm.").content == "Hm."


def test_llamaindexs_reranks_are_told_of() -> None:
    assert {"query", "nodes", "top_n", "model_name"} <= ReRankStartEvent.model_fields.keys()
    assert {"nodes", "tags"} <= ReRankEndEvent.model_fields.keys()
    assert CBEventType.RERANKING
    assert {"NODES", "QUERY_STR", "TOP_K", "MODEL_NAME"} <= set(EventPayload.__members__)
    assert callable(get_dispatcher("grating").event)


@pytest.mark.parametrize("taken", ["temperature", "max_tokens"])
def test_a_custom_llm_declares_its_own_settings(taken: str) -> None:
    assert taken not in CustomLLM.model_fields
