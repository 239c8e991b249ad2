"""GratingLLM: prompts, chats, streams, events, and a model of the hub."""

import asyncio
import copy
import pickle

import pytest
from llama_index.core.base.llms import types
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload, LlamaDebugHandler
from llama_index.core.callbacks.token_counting import get_tokens_from_response
from llama_index.core.indices.prompt_helper import PromptHelper
from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
from llama_index.core.prompts import PromptTemplate
from llama_index.core.response_synthesizers import get_response_synthesizer
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.llms.grating import GratingLLM

from grating_core import GratingError
from tests.core.models.test_hub import FIRST, NAME, TOKEN, cached
from tests.tiny_chat import GEMMAS, ROLES, WINDOW, check_cancelled, save_chat_model

MESSAGES = [
    ChatMessage(role="system", content="w1 w2"),
    ChatMessage(role="user", content="w3"),
    ChatMessage(role="assistant", content="w4 w5"),
    ChatMessage(role="user", blocks=[TextBlock(text="w6"), TextBlock(text="w7 w8")]),
]
SPOKEN = "{system} w1 w2 {user} w3 {assistant} w4 w5 {user} w6 w7 w8 {assistant} ".format(**ROLES)


@pytest.fixture(scope="module")
def gemmas(tmp_path_factory):
    return save_chat_model(tmp_path_factory.mktemp("gemma"), GEMMAS)


@pytest.fixture
def llm(directory):
    return GratingLLM(model=str(directory), max_tokens=12)


def test_a_prompt_is_continued_and_messages_go_through_the_chat_template(llm, core):
    assert llm.complete("w1 w2").text == core.generate("w1 w2", max_new_tokens=12).text
    wanted = core.generate(SPOKEN, max_new_tokens=12)
    answer = llm.chat(MESSAGES)
    assert (answer.message.role, answer.message.content) == ("assistant", wanted.text)
    assert answer.message.additional_kwargs == {}  # they would be written into chat histories
    assert get_tokens_from_response(answer) == (wanted.prompt_tokens, wanted.new_tokens)
    assert answer.raw["finish_reason"] == "length"


def test_prompts_of_ones_own(directory, llm):
    own = GratingLLM(
        model=str(directory),
        max_tokens=12,
        messages_to_prompt=lambda messages: " ".join(message.content for message in messages),
        completion_to_prompt=lambda prompt: f"w9 {prompt}",
        system_prompt="w1 w2",
    )
    assert own.chat([ChatMessage("w3"), ChatMessage("w4")]).message.content == llm.complete("w3 w4").text
    assert own.complete("w3").text == llm.complete("w9 w3").text
    assert own.complete("w3", formatted=True).text == llm.complete("w3").text
    assert own.predict(PromptTemplate("w3 {word}"), word="w4") == llm.complete("w1 w2 w3 w4").text


def test_what_is_no_text_is_refused(llm):
    for message, said in [
        (ChatMessage(role="tool", content="w1"), r"messages\[1\] has the role 'tool'"),
        (ChatMessage(blocks=[ImageBlock(url="http://localhost/a.png")]), r"messages\[1\] has a ImageBlock"),
    ]:
        with pytest.raises(ValueError, match=said):
            llm.chat([MESSAGES[0], message])
    assert llm.chat(MESSAGES).message.content


def test_settings_reach_the_model(directory, core):
    settings = {"temperature": 0.9, "top_p": 0.8, "seed": 5}
    llm = GratingLLM(model=str(directory), max_tokens=20, **settings)
    sampled = core.generate(SPOKEN, max_new_tokens=20, **settings).text
    assert llm.chat(MESSAGES).message.content == sampled
    greedy = core.generate(SPOKEN, max_new_tokens=6).text
    assert llm.chat(MESSAGES, temperature=0.0, max_tokens=6).message.content == greedy != sampled
    word = sampled.split()[3]
    stopped = llm.model_copy(update={"stop": [word]}).chat(MESSAGES)
    assert stopped.message.content == core.generate(SPOKEN, max_new_tokens=20, stop=[word], **settings).text
    assert stopped.raw["finish_reason"] == "stop"
    for name, value in {"temperature": -1, "top_p": 0, "max_tokens": 0, "max_lenght": 5}.items():
        with pytest.raises(ValueError, match=name):
            GratingLLM(model=str(directory), **{name: value})
    for name, value in {"temperature": -1, "tools": []}.items():
        with pytest.raises(ValueError, match=name):
            llm.complete("w1", **{name: value})


async def test_every_way_of_asking_gives_the_same(llm):
    completed, chatted = llm.complete("w1 w2").text, llm.chat(MESSAGES).message.content
    assert (await llm.acomplete("w1 w2")).text == completed
    assert (await llm.achat(MESSAGES)).message.content == chatted
    streamed = {
        completed: [list(llm.stream_complete("w1 w2")), [r async for r in await llm.astream_complete("w1 w2")]],
        chatted: [list(llm.stream_chat(MESSAGES)), [r async for r in await llm.astream_chat(MESSAGES)]],
    }
    for text, ways in streamed.items():
        for responses in ways:
            assert len(responses) > 4
            assert "".join(response.delta for response in responses) == text
            assert getattr(responses[-1], "text", None) or responses[-1].message.content == text
            assert [bool(response.raw) for response in responses] == [False] * (len(responses) - 1) + [True]


def test_callbacks_and_metadata(directory):
    debug = LlamaDebugHandler(print_trace_on_end=False)
    llm = GratingLLM(model=str(directory), max_tokens=7, callback_manager=CallbackManager([debug]))
    answer = llm.chat(MESSAGES)
    ((start, end),) = debug.get_event_pairs(CBEventType.LLM)
    assert start.payload[EventPayload.MESSAGES] == MESSAGES
    assert end.payload[EventPayload.RESPONSE] == answer
    metadata = llm.metadata
    # LlamaIndex counts by another tokenizer: a quarter of the window is kept back.
    assert (metadata.context_window, metadata.num_output, metadata.is_chat_model) == (WINDOW * 3 // 4, 7, True)
    assert metadata.model_name == str(directory)


def test_settings_come_back_and_share_the_model(llm):
    llm.complete("w1")
    assert GratingLLM(model="not-loaded-before-it-is-used").to_payload()["max_tokens"] == 256
    pickled = pickle.dumps(llm)
    assert len(pickled) < 2000  # settings, no weights
    twins = [GratingLLM.from_json(llm.to_json()), pickle.loads(pickled), copy.deepcopy(llm), llm.model_copy()]
    assert all(twin.to_dict() == llm.to_dict() and twin.llm is llm.llm for twin in twins)
    assert llm.model_copy(update={"dtype": "bfloat16"}).llm is not llm.llm


async def test_more_requests_than_worker_threads(llm):
    prompts = [f"w{n} w{n + 1}" for n in range(10)]
    answers = await asyncio.gather(*map(llm.acomplete, prompts))
    assert [answer.text for answer in answers] == [llm.complete(prompt).text for prompt in prompts]


async def test_what_is_cancelled_stops_computing(llm):
    await check_cancelled(llm.acomplete)


def test_what_a_model_thought_is_left_out(llm):
    if not hasattr(types, "ThinkingBlock"):
        pytest.skip("this version of LlamaIndex has no such block")
    thought = types.ThinkingBlock(content="w20 w21")
    thinking = ChatMessage(role="assistant", blocks=[thought, TextBlock(text="w4 w5")])
    assert llm.chat([*MESSAGES[:2], thinking, MESSAGES[3]]).message == llm.chat(MESSAGES).message


def test_an_answer_is_as_long_as_there_is_room(directory):
    short = GratingLLM(model=str(directory), max_length=40, max_tokens=30)
    full = short.complete("w1 " * 15)  # and the token that begins a text, which this tokenizer does not write
    assert get_tokens_from_response(full) == (15, 25)
    assert get_tokens_from_response(short.chat(MESSAGES))[1] == 40 - len(SPOKEN.split())


async def test_what_engines_would_not_hear_is_said(directory):
    """They take a ValueError for an answer that cannot be parsed, and go on without it."""
    short = GratingLLM(model=str(directory), max_length=40, max_tokens=30)
    for ask in (
        lambda: short.chat([ChatMessage("w1 " * 50)]),
        lambda: short.complete("w1 " * 40),
        lambda: list(short.stream_chat([ChatMessage("w1 " * 50)])),
        lambda: get_response_synthesizer(
            llm=short, prompt_helper=PromptHelper(context_window=4096), response_mode="compact"
        ).synthesize("w1", [NodeWithScore(node=TextNode(text="w1 " * 100))]),
    ):
        with pytest.raises(GratingError, match="leaves no room for an answer within max_length=40") as refusal:
            ask()
        assert not isinstance(refusal.value, ValueError)
    with pytest.raises(GratingError, match="leaves no room"):
        await short.achat([ChatMessage("w1 " * 50)])


@pytest.mark.parametrize("template", ["plain", "gemma"])
@pytest.mark.parametrize(
    ("mode", "window"),
    [
        ("compact", WINDOW),
        ("compact", 1024),
        ("refine", 1024),
        ("tree_summarize", 1024),
        ("simple_summarize", 1024),
        ("accumulate", 1024),
    ],
)
async def test_a_context_that_fills_the_window_is_answered(directory, gemmas, template, mode, window):
    """LlamaIndex's own prompts begin with a system message, and it counts tokens for itself."""
    llm = GratingLLM(model=str({"plain": directory, "gemma": gemmas}[template]), max_length=window, max_tokens=8)
    nodes = [NodeWithScore(node=TextNode(text=f"w{n} is (w{n + 1}). " * 300)) for n in range(2)]
    synthesizer = get_response_synthesizer(llm=llm, response_mode=mode)
    for answer in (synthesizer.synthesize("w3 w4?", nodes), await synthesizer.asynthesize("w3 w4?", nodes)):
        assert str(answer).strip()
        assert "Empty Response" not in str(answer)


def test_a_version_is_loaded_and_a_token_stays_here(tmp_path):
    cached(tmp_path / "hub", FIRST, save_chat_model(tmp_path / "chat"), "old")
    llm = GratingLLM(
        model=NAME, cache_dir=tmp_path / "hub", local_files_only=True, revision="old", token=TOKEN, max_tokens=3
    )
    assert llm.complete("w1").text
    assert llm.llm.model_path.name == FIRST
    for text in (repr(llm), repr(llm.to_payload()), llm.to_json(), repr(pickle.dumps(llm))):
        assert TOKEN not in text
