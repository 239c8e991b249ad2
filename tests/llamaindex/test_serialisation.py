"""Written down, pickled and copied: what comes back is the same, or is refused."""

import copy
import json
import pickle

import pytest
from llama_index.core.callbacks import CallbackManager, LlamaDebugHandler
from llama_index.core.schema import MetadataMode
from llama_index.postprocessor.grating import GratingContextSelector, GratingRerank
from workflows.context.serializers import JsonSerializer

from grating_core import ClusterPolicy, Prompt, Reranker, Route
from grating_core.pruning import Off
from tests.core.models.test_decoders import save_decoder

QUERY = "How many people live in Berlin?"
PROMPT = Prompt(("<s>", "w1 {instruction} {query}", "w2 {document}"), yes="w3", no=None)


class Own:
    """A policy of the user's."""

    def route(self, layer, scores, top_k):
        return [Route.DEFERRED] * len(scores)


def settings_of(postprocessor):
    return {
        name: getattr(postprocessor, name)
        for name in GratingRerank.model_fields
        if name not in ("reranker", "callback_manager")
    }


def through_json(postprocessor):
    return GratingRerank.from_json(postprocessor.to_json())


def through_dict(postprocessor):
    return GratingRerank.from_dict(postprocessor.to_dict())


def through_pickle(postprocessor):
    return pickle.loads(pickle.dumps(postprocessor))


def through_a_workflows_context(postprocessor):
    serializer = JsonSerializer()
    return serializer.deserialize(serializer.serialize({"reranker": postprocessor}))["reranker"]


ways = pytest.mark.parametrize("way", [through_json, through_dict, through_pickle, through_a_workflows_context])


@ways
@pytest.mark.parametrize("pruning", ["auto", "off", "cluster", ClusterPolicy(3.0, clusters=3)])
def test_settings_come_back_and_share_the_model(model, nodes, pruning, way):
    postprocessor = GratingRerank(
        model=model, top_n=2, pruning=pruning, score_threshold=-3.5, raw_scores=True, metadata_mode="none",
        max_query_tokens=20, keep_retrieval_score=True, target=0.9,
    )  # fmt: skip
    twin = way(postprocessor)
    assert settings_of(twin) == settings_of(postprocessor)
    assert twin.pruning == pruning
    assert twin.metadata_mode is MetadataMode.NONE
    assert twin.reranker is postprocessor.reranker
    assert twin.postprocess_nodes(nodes, query_str=QUERY) == postprocessor.postprocess_nodes(
        nodes, query_str=QUERY
    )


@ways
def test_a_prompt_comes_back(tmp_path, way):
    postprocessor = GratingRerank(
        model=str(save_decoder(tmp_path, "qwen3")),
        template=PROMPT,
        instruction="w5",
        dtype="float32",
        device="cpu",
    )
    twin = way(postprocessor)
    assert twin.template == PROMPT
    assert twin.reranker is postprocessor.reranker


def test_what_is_written_names_the_class_and_no_model(model):
    written = json.loads(GratingRerank(model=model, pruning=Off()).to_json())
    assert written["class_name"] == "GratingRerank"
    assert written["pruning"] == "off"
    assert written.keys().isdisjoint({"reranker", "callback_manager"})


def test_a_policy_of_your_own_is_refused_and_given_back_by_name(model):
    policy = Own()
    postprocessor = GratingRerank(model=model, pruning=policy, top_n=2)
    for write in (postprocessor.to_dict, postprocessor.to_json):
        with pytest.raises(ValueError, match=r"pruning=<.*Own.*from_dict\(data, pruning=\.\.\.\)"):
            write()
    twin = GratingRerank.from_dict(postprocessor.to_dict(exclude={"pruning"}), pruning=policy)
    assert settings_of(twin) == settings_of(postprocessor)
    assert through_pickle(postprocessor).pruning is not policy  # pickle can take it along


def test_a_ready_reranker_is_refused_but_pickles(tmp_path, nodes):
    reranker = Reranker.from_pretrained(
        save_decoder(tmp_path, "qwen3"), template=PROMPT, pruning="off", dtype="float32", device="cpu"
    )
    postprocessor = GratingRerank(reranker=reranker, top_n=2)
    with pytest.raises(ValueError, match=r"reranker was given ready-made.*give its model and settings"):
        postprocessor.to_dict()
    twin = through_pickle(postprocessor)
    assert twin.reranker is not reranker
    assert twin.postprocess_nodes(nodes, query_str="w6") == postprocessor.postprocess_nodes(nodes, query_str="w6")


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, GratingRerank.model_copy])
def test_copies_share_the_model_and_nothing_that_is_set(model, reranker, copied):
    for postprocessor in (GratingRerank(model=model, top_n=2), GratingRerank(reranker=reranker, top_n=2)):
        twin = copied(postprocessor)
        twin.top_n = 5
        assert twin.reranker is postprocessor.reranker
        assert postprocessor.top_n == 2
        assert copy.deepcopy([postprocessor, postprocessor])[1].reranker is postprocessor.reranker


def test_settings_of_the_model_are_fixed(model, reranker):
    postprocessor = GratingRerank(model=model, top_n=2)
    with pytest.raises(AttributeError, match=r"pruning is fixed.*model_copy\(update=\{'pruning': 'off'\}\) makes"):
        postprocessor.pruning = "off"
    unpruned = postprocessor.model_copy(update={"pruning": "off"})
    assert (unpruned.pruning, unpruned.top_n) == ("off", 2)
    assert unpruned.reranker is not postprocessor.reranker
    with pytest.raises(ValueError, match="leave those out"):
        GratingRerank(reranker=reranker).model_copy(update={"pruning": "off"})


def test_what_is_assigned_is_checked_and_kept(model):
    postprocessor = GratingRerank(model=model)
    postprocessor.top_n = 7
    assert through_pickle(postprocessor).top_n == through_json(postprocessor).top_n == 7
    with pytest.raises(ValueError, match="top_n"):
        postprocessor.top_n = 0
    postprocessor.score_threshold = 1.0
    with pytest.raises(ValueError, match="exclude each other"):
        postprocessor.scores = "estimated"
    assert postprocessor.top_n == 7


def test_the_context_selector_comes_back_as_well(model):
    selector = GratingContextSelector(model=model, max_tokens=50, pruning=ClusterPolicy(3.0))
    for twin in (
        GratingContextSelector.from_json(selector.to_json()),
        through_pickle(selector),
        copy.deepcopy(selector),
    ):
        assert (type(twin), twin.max_tokens, twin.pruning) == (GratingContextSelector, 50, selector.pruning)
        assert twin.reranker is selector.reranker


def test_callbacks_stay_where_they_are(model):
    manager = CallbackManager([LlamaDebugHandler(print_trace_on_end=False)])
    assert through_pickle(GratingRerank(model=model, callback_manager=manager)).callback_manager.handlers == []
