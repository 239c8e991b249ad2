"""From a dump, a pickle or a copy the same reranker is made again; or it is refused to make one."""

import copy
import json
import pickle
import warnings

import pytest
from langchain_core.load import dumps, loads
from langchain_grating import GratingCrossEncoder, GratingRerank
from pydantic_core import PydanticSerializationError

from grating_core import ClusterPolicy, Prompt, Reranker, Route
from grating_core.pruning import Off
from tests.core.models.test_decoders import save_decoder

PROMPT = Prompt(("<s>", "w1 {query}", "w2 {document}"), yes="w3", no=None)


class Keeps:
    def route(self, layer, scores, top_k):
        return [Route.DEFERRED] * len(scores)


@pytest.fixture(params=["numbers", "policy", "prompt"])
def compressor(request, model, tmp_path):
    if request.param == "numbers":
        return GratingRerank(
            model=model, top_n=None, score_threshold=-1.5, raw_scores=True, prefix_metadata="rank_"
        )
    if request.param == "policy":
        return GratingRerank(model=model, pruning=ClusterPolicy(dispersion_threshold=float("inf"), clusters=3))
    return GratingRerank(model=str(save_decoder(tmp_path, "qwen3")), template=PROMPT, device="cpu")


def test_dumps_make_the_same_reranker(compressor):
    twins = [
        GratingRerank(**compressor.model_dump()),
        GratingRerank(**json.loads(json.dumps(compressor.model_dump(mode="json")))),
        GratingRerank.model_validate_json(compressor.model_dump_json()),
        GratingRerank.model_validate_json(compressor.model_dump_json(exclude_unset=True)),
    ]
    assert all(twin == compressor and twin.reranker is compressor.reranker for twin in twins)


@pytest.mark.filterwarnings("ignore:The function `loads` is in beta")
def test_langchains_own_dumps(compressor):
    allowed = {"allowed_objects": [type(compressor)], "valid_namespaces": ["langchain_grating"]}
    twin = loads(dumps(compressor), **allowed)
    assert twin == compressor
    assert twin.reranker is compressor.reranker


def test_copies_and_pickles_share_the_reranker(compressor):
    pickled = pickle.dumps(compressor)
    assert len(pickled) < 2000  # settings, no weights
    twins = [
        copy.copy(compressor), copy.deepcopy(compressor), compressor.model_copy(), pickle.loads(pickled)
    ]  # fmt: skip
    assert all(twin == compressor and twin.reranker is compressor.reranker for twin in twins)


def test_the_cross_encoder_too(model):
    encoder = GratingCrossEncoder(model=model, pruning=Off())
    twins = [GratingCrossEncoder(**json.loads(encoder.model_dump_json())), pickle.loads(pickle.dumps(encoder))]
    assert [twin.pruning for twin in twins] == ["off", Off()]
    assert twins[1] == encoder


def test_a_copy_with_other_settings_has_another_reranker(model):
    compressor = GratingRerank(model=model, top_n=2)
    other = compressor.model_copy(update={"pruning": "off"})
    assert (other.top_n, other.pruning, compressor.pruning) == (2, "off", "auto")
    assert other.reranker is not compressor.reranker
    assert compressor.model_copy(update={"top_n": 5}).reranker is compressor.reranker
    with pytest.raises(ValueError, match="top_n"):
        compressor.model_copy(update={"top_n": 0})


def test_settings_of_the_model_are_fixed(model):
    compressor = GratingRerank(model=model)
    with pytest.raises(AttributeError, match=r"pruning is fixed.*model_copy\(update=\{'pruning': 'off'\}\)"):
        compressor.pruning = "off"
    loaded = compressor.reranker
    compressor.top_n = 1
    assert compressor.model_dump()["top_n"] == 1
    assert compressor.reranker is loaded
    for name, value in {"top_n": 0, "score_threshold": "high", "top_k": 3}.items():
        with pytest.raises(ValueError, match=name):
            setattr(compressor, name, value)
    compressor.score_threshold = 0.0
    with pytest.raises(ValueError, match=r"score_threshold=0\.0 and scores='estimated'"):
        compressor.scores = "estimated"


def test_a_policy_of_ones_own(model):
    policy = Keeps()
    compressor = GratingRerank(model=model, pruning=policy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert GratingRerank(**compressor.model_dump()) == compressor
    with pytest.raises(PydanticSerializationError, match=r"pruning=.*Keeps.* cannot be written as JSON"):
        compressor.model_dump_json()
    with pytest.raises(PydanticSerializationError, match=r"pruning=.*Keeps.* cannot be written as JSON"):
        dumps(compressor)
    assert json.loads(compressor.model_dump_json(exclude={"pruning"}))["model"] == model


def test_a_ready_reranker(tmp_path):
    with Reranker.from_pretrained(save_decoder(tmp_path, "qwen3"), template=PROMPT, device="cpu") as reranker:
        compressor = GratingRerank(reranker=reranker, top_n=2)
        for dump in (compressor.model_dump, compressor.model_dump_json, lambda: dumps(compressor)):
            with pytest.raises(PydanticSerializationError, match="reranker was given ready-made"):
                dump()
        copied = copy.deepcopy(compressor)
        assert copied == compressor
        assert copied.reranker is reranker
        assert compressor.model_copy(update={"top_n": 4}).reranker is reranker
        twin = pickle.loads(pickle.dumps(compressor))  # with the weights: nothing else says what they are
        assert twin.reranker.score([("w1", "w2")]) == reranker.score([("w1", "w2")])
