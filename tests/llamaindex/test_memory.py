"""Agent memory: what has left the conversation comes back through the reranker."""

import pytest
from llama_index.core.agent.workflow import ReActAgent
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.instrumentation.events.rerank import ReRankStartEvent
from llama_index.core.llms import ChatMessage, MockLLM
from llama_index.core.memory import Memory, VectorMemoryBlock
from llama_index.core.storage.chat_store.sql import MessageStatus
from llama_index.postprocessor.grating import GratingRerank
from llama_index.vector_stores.qdrant import QdrantVectorStore
from qdrant_client import AsyncQdrantClient, models

from tests.llamaindex.conftest import HashedWords

CONVERSATION = [
    ("My sister Inês keeps bees near Évora.", "How many hives does she have?"),
    ("Eleven. I cannot eat what she sends, though: pollen makes me ill.", "I will remember that."),
    ("We moved to Porto in March.", "What do you like about the place?"),
    ("The light, and that the sea is near.", "And the people?"),
    ("I have not met many. What should I do about it?", "What do you like to do in a group?"),
    ("I play the viola. There is a quartet on Tuesdays.", "What do you play with them?"),
    ("Haydn, mostly. What I like best is the slow movements.", "They suit the viola."),
    ("The cat is called Miro, by the way.", "After the painter?"),
    ("After the painter. He is afraid of the sea.", "And of the quartet?"),
    ("Of the second violin. What a wise cat.", "Indeed."),
]
FACT = "pollen makes me ill"
QUESTION = "What food am I allergic to?"
FILLER = "We talked about the weather, which was mild, and about trains, which were late. "


@pytest.fixture
async def store():
    """A vector store in this process that is there before anything is in it, as an agent's memory needs."""
    client = AsyncQdrantClient(":memory:")
    vectors = {"text-dense": models.VectorParams(size=64, distance=models.Distance.COSINE)}
    await client.create_collection("memory", vectors_config=vectors)
    yield QdrantVectorStore("memory", aclient=client)
    await client.close()


@pytest.fixture
def memory(store):
    """Makes memories over one store; they flush two messages at a time."""

    def make(*postprocessors, session="ana", **block):
        block = VectorMemoryBlock(
            vector_store=store,
            embed_model=HashedWords(),
            node_postprocessors=list(postprocessors),
            **{"similarity_top_k": 10, "retrieval_context_window": 2} | block,
        )
        return Memory.from_defaults(
            session_id=session,
            token_limit=100,
            chat_history_token_ratio=0.4,
            token_flush_size=1,
            memory_blocks=[block],
        )

    return make


async def talk(memory, conversation=CONVERSATION):
    for said, answered in conversation:
        await memory.aput_messages(
            [
                ChatMessage(role="user", content=said),
                ChatMessage(role="assistant", content=answered),
            ]
        )


async def recalled(memory, question=QUESTION):
    """What the block puts before the conversation; "" if nothing."""
    first = (await memory.aget(input=question))[0]
    return first.content if first.role == "system" else ""


def message(role, content):
    return f"<message role='{role}'>{content}</message>"


async def test_what_was_flushed_comes_back_as_the_reranker_picks(reranker, memory):
    remembering = memory(GratingRerank(reranker=reranker, top_n=2, metadata_mode="none"))
    await talk(remembering)
    archived = await remembering.aget_all(status=MessageStatus.ARCHIVED)
    texts = [message(kept.role.value, kept.content) for kept in archived]
    exchanges = ["\n".join(texts[start : start + 2]) for start in range(0, len(texts), 2)]
    assert len(exchanges) > 6

    query = f"{CONVERSATION[-1][1]} {QUESTION}"  # the last message kept, and the input
    wanted = [ranked.text for ranked in reranker.rerank(query, exchanges, 2).ranking]
    assert FACT in wanted[0]
    found = await recalled(remembering)
    assert "\n\n".join(wanted) in found
    assert found.count("role='user'") == 2
    assert FACT not in await recalled(memory(similarity_top_k=2))  # what the words alone lead to


async def test_nothing_comes_back_below_the_threshold(reranker, memory):
    remembering = memory(GratingRerank(reranker=reranker, score_threshold=0.0001, metadata_mode="none"))
    await talk(remembering)
    assert (await recalled(remembering)).count("role='user'") == 1
    assert await recalled(remembering, "How do I bleed a radiator?") == ""


async def test_the_blocks_metadata_is_not_judged_if_you_say_so(reranker, memory, events):
    """It is the session's id, which says nothing about what was said."""
    for mode, judged in {"none": "<message", "embed": "session_id: ana"}.items():
        remembering = memory(GratingRerank(reranker=reranker, top_n=1, metadata_mode=mode))
        await talk(remembering, CONVERSATION[:6])
        await recalled(remembering)
        retrieved, best = events[-2].nodes, events[-1].nodes[0]
        text = best.get_content(metadata_mode=mode)
        assert text.startswith(judged)
        texts = [node.get_content(metadata_mode=mode) for node in retrieved]
        query = f"{CONVERSATION[5][1]} {QUESTION}"
        assert best.score == reranker.rerank(query, texts, 1).ranking[0].probability


async def test_a_long_message_is_asked_by_its_end(reranker, memory):
    remembering = memory(GratingRerank(reranker=reranker, top_n=1, metadata_mode="none"))
    await talk(remembering)
    long = FILLER * 40 + QUESTION
    with pytest.raises(ValueError, match="leaves no room"):
        reranker.rerank(long, ["a memory"])
    short = memory(GratingRerank(reranker=reranker, top_n=1, metadata_mode="none", max_query_tokens=8))
    assert FACT in await recalled(short, long)
    assert "role='user'" in await recalled(remembering, long)


async def test_a_memory_longer_than_the_window_is_judged_by_its_best_part(model, memory):
    """All messages that are flushed together are one memory."""
    said, answered = CONVERSATION[1]
    food = ("I like the food in Porto.", "What food do you like best?")
    found = {}
    for long_documents in ("truncate", "windows"):
        postprocessor = GratingRerank(model=model, top_n=1, metadata_mode="none", long_documents=long_documents)
        remembering = memory(postprocessor, session=long_documents)
        await talk(remembering, [(FILLER * 50 + said, answered), food, *CONVERSATION[2:]])
        found[long_documents] = await recalled(remembering)
    assert FACT in found["windows"]
    assert FACT not in found["truncate"]


async def test_sessions_are_apart(reranker, memory):
    postprocessor = GratingRerank(reranker=reranker, top_n=10, metadata_mode="none")
    ana, rui = memory(postprocessor), memory(postprocessor, session="rui")
    await talk(ana)
    await talk(rui, [("I am allergic to nuts.", "Noted.")] * 8)
    assert FACT in await recalled(ana)
    assert "nuts" not in await recalled(ana)
    assert FACT not in await recalled(rui)


async def test_in_a_chat_engine(reranker, memory):
    """MockLLM answers with its prompt: what was recalled reaches it."""
    remembering = memory(GratingRerank(reranker=reranker, top_n=1, metadata_mode="none"))
    await talk(remembering)
    answer = await SimpleChatEngine.from_defaults(llm=MockLLM(), memory=remembering).achat(QUESTION)
    assert FACT in answer.response


async def test_in_an_agent(reranker, memory, events):
    remembering = memory(GratingRerank(reranker=reranker, top_n=1, metadata_mode="none"))
    agent = ReActAgent(llm=MockLLM(max_tokens=5), tools=[])
    for said, _ in [*CONVERSATION, (QUESTION, "")]:
        await agent.run(user_msg=said, memory=remembering)
    starts = [event for event in events if isinstance(event, ReRankStartEvent)]
    (start,) = [event for event in starts if event.query.query_str.endswith(QUESTION)]
    assert FACT in events[events.index(start) + 1].nodes[0].text
