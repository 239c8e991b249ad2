"""Models on a hub: which version, where it is kept, and who asks, which nobody else is to read."""

import copy
import json
import pickle

import pytest
from langchain_core.load import dumps, loads
from langchain_grating import ChatGrating, GratingRerank

from tests.core.conftest import save_model
from tests.core.models.test_hub import FIRST, NAME, SECOND, TOKEN, cached
from tests.tiny_chat import save_chat_model


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Arguments that find two versions of a model in a hub's cache."""
    cache = tmp_path_factory.mktemp("hub")
    cached(cache, FIRST, save_model(tmp_path_factory.mktemp("old"), "bert"), "old")
    cached(cache, SECOND, save_model(tmp_path_factory.mktemp("new"), "bert", seed=1), "main")
    return {"model": NAME, "cache_dir": cache, "local_files_only": True}


def test_a_version_is_loaded_and_shared(hub):
    newest, old = GratingRerank(**hub), GratingRerank(**hub, revision="old", token=TOKEN)
    assert (newest.reranker.model_path.name, old.reranker.model_path.name) == (SECOND, FIRST)
    assert GratingRerank(**hub, model_kwargs={"revision": "old"}, token=TOKEN).reranker is old.reranker
    assert newest.cache_dir == str(hub["cache_dir"])


@pytest.mark.filterwarnings("ignore:The function `loads` is in beta")
def test_a_token_stays_here(hub):
    compressor = GratingRerank(**hub, token=TOKEN, revision="old")
    pickled = pickle.dumps(compressor)
    written = [
        repr(compressor), str(compressor), repr(compressor.model_dump()), compressor.model_dump_json(),
        dumps(compressor), repr(pickled), repr(compressor.to_json()),
    ]  # fmt: skip
    assert not [text for text in written if TOKEN in text]
    assert json.loads(dumps(compressor))["kwargs"]["token"] == {"lc": 1, "type": "secret", "id": ["HF_TOKEN"]}
    twins = [
        pickle.loads(pickled),
        GratingRerank(**json.loads(compressor.model_dump_json())),
        loads(dumps(compressor), allowed_objects=[GratingRerank], valid_namespaces=["langchain_grating"]),
    ]
    for twin in twins:
        assert (twin.token, twin.revision, twin.model) == (None, "old", NAME)
    for twin in (copy.copy(compressor), copy.deepcopy(compressor), compressor.model_copy()):
        assert twin.token.get_secret_value() == TOKEN, "in this process it is the same object's"
        assert twin.reranker is compressor.reranker


def test_errors_do_not_quote_a_token(hub):
    compressor = GratingRerank(**hub, token=TOKEN)
    for fail in (
        lambda: GratingRerank(**hub, token=TOKEN, score_threshold=3.0, scores="estimated"),
        lambda: GratingRerank(**hub, token=TOKEN, top_n=0),
        lambda: GratingRerank(**hub, token=TOKEN, tokens=3),
        lambda: GratingRerank(**hub, token=TOKEN, reranker=compressor.reranker),
        lambda: setattr(compressor, "token", TOKEN),
        lambda: ChatGrating(model=NAME, token=TOKEN, max_tokens=0),
    ):
        with pytest.raises((ValueError, AttributeError)) as refusal:
            fail()
        assert TOKEN not in str(refusal.value)


def test_a_language_model_too(tmp_path):
    cached(tmp_path / "hub", FIRST, save_chat_model(tmp_path / "chat"), "old")
    llm = ChatGrating(
        model=NAME, cache_dir=tmp_path / "hub", local_files_only=True, revision="old", token=TOKEN, max_tokens=3
    )
    assert llm.invoke("w1").text
    assert llm.llm.model_path.name == FIRST
    written = [
        repr(llm),
        llm.model_dump_json(),
        dumps(llm),
        repr(pickle.dumps(llm)),
        repr(llm._identifying_params),
    ]
    assert not [text for text in written if TOKEN in text]
