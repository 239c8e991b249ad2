"""Each dialect, byte for byte as its clients send and read it."""

import math
from typing import Any

import httpx
import pytest

from grating_core import Reranker
from tests.core.serving.conftest import DOCUMENTS, NAME, ORDER, QUERY

PATHS = ("/rerank", "/v1/rerank", "/v2/rerank", "/reranking", "/v1/reranking")


def ask(client: httpx.Client, path: str, **body: Any) -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.fixture(scope="module")
def logits(bundled: Reranker) -> list[float]:
    return bundled.score([(QUERY, text) for text in DOCUMENTS])


def sigmoid(score: float) -> float:
    return 1 / (1 + math.exp(-score))


@pytest.mark.parametrize("path", PATHS)
def test_a_rerank_answers_as_cohere_jina_and_vllm_do(client: httpx.Client, path: str, logits: list[float]) -> None:
    answer = ask(client, path, model=NAME, query=QUERY, documents=DOCUMENTS)
    assert [result["index"] for result in answer["results"]] == ORDER
    scores = [result["relevance_score"] for result in answer["results"]]
    assert scores == pytest.approx([sigmoid(logits[index]) for index in ORDER], abs=1e-4)
    assert [result["document"] for result in answer["results"]] == [{"text": DOCUMENTS[i]} for i in ORDER]
    tokens = answer["usage"]["total_tokens"]
    assert tokens > 3 * len(QUERY.split())
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert (answer["object"], answer["model"]) == ("list", NAME)
    assert answer["meta"] == {
        "api_version": {"version": "2" if path == "/v2/rerank" else "1"},
        "billed_units": {"search_units": 1},
        "tokens": {"input_tokens": tokens, "output_tokens": 0},
    }
    assert isinstance(answer["id"], str)


@pytest.mark.parametrize(("top_n", "found"), [(1, 1), (2, 2), (3, 3), (9, 3), (0, 3), (None, 3)])
def test_top_n_says_how_many_come_back(client: httpx.Client, top_n: int | None, found: int) -> None:
    answer = ask(client, "/v1/rerank", query=QUERY, documents=DOCUMENTS, top_n=top_n)
    assert [result["index"] for result in answer["results"]] == ORDER[:found]


@pytest.mark.parametrize(
    "wish", [{"use_activation": False}, {"activation": False}, {"grating": {"raw_scores": True}}]
)
def test_raw_scores_are_logits(client: httpx.Client, wish: dict[str, Any], logits: list[float]) -> None:
    answer = ask(client, "/v1/rerank", query=QUERY, documents=DOCUMENTS, **wish)
    scores = [result["relevance_score"] for result in answer["results"]]
    assert scores == pytest.approx([logits[index] for index in ORDER], abs=1e-3)


def test_a_threshold_is_on_the_scale_of_the_scores(client: httpx.Client, logits: list[float]) -> None:
    asked = {"query": QUERY, "documents": DOCUMENTS}
    for index, raw in ((ORDER[0], False), (ORDER[1], False), (ORDER[1], True)):
        threshold = logits[index] - 1e-2 if raw else 0.9 * sigmoid(logits[index])
        wishes = {"score_threshold": threshold, "raw_scores": raw}
        for body in ({"documents": DOCUMENTS}, {"texts": DOCUMENTS}):
            answer = ask(client, "/rerank", query=QUERY, grating=wishes, **body)
            found = answer if isinstance(answer, list) else answer["results"]
            assert [result["index"] for result in found] == ORDER[: ORDER.index(index) + 1]
    assert ask(client, "/rerank", **asked, grating={"score_threshold": 1})["results"] == []
    for wishes in ({"score_threshold": -3.5}, {"score_threshold": 0.5, "scores": "estimated"}):
        refused = client.post("/rerank", json={**asked, "grating": wishes})
        assert refused.status_code == 422
        assert "score_threshold=" in refused.json()["message"]
    pairs = {"text_1": QUERY, "text_2": DOCUMENTS, "grating": {"score_threshold": 0.5}}
    assert client.post("/score", json=pairs).status_code == 422


def test_documents_may_be_objects_with_text(client: httpx.Client) -> None:
    documents = [{"text": text, "id": number} for number, text in enumerate(DOCUMENTS)]
    answer = ask(client, "/v1/rerank", query=QUERY, documents=documents)
    assert answer["results"][0]["document"] == {"text": DOCUMENTS[1]}


def test_documents_are_left_out_if_nobody_wants_them(client: httpx.Client) -> None:
    answer = ask(client, "/v1/rerank", query=QUERY, documents=DOCUMENTS, return_documents=False)
    assert [sorted(result) for result in answer["results"]] == [["index", "relevance_score"]] * 3


def test_fields_for_other_servers_are_ignored(client: httpx.Client) -> None:
    other = {"max_tokens_per_doc": 4096, "max_chunks_per_doc": 10, "rank_fields": ["text"], "priority": 0}
    answer = ask(client, "/v2/rerank", query=QUERY, documents=DOCUMENTS, **other)
    assert answer["results"][0]["index"] == 1


def test_no_documents_are_no_results(client: httpx.Client) -> None:
    assert ask(client, "/rerank", query=QUERY, documents=[])["results"] == []
    assert ask(client, "/rerank", query=QUERY, texts=[]) == []
    assert ask(client, "/score", text_1=QUERY, text_2=[])["data"] == []


def test_texts_answer_as_text_embeddings_inference_does(client: httpx.Client, logits: list[float]) -> None:
    answer = ask(client, "/rerank", query=QUERY, texts=DOCUMENTS)
    assert [sorted(rank) for rank in answer] == [["index", "score"]] * 3
    assert [rank["index"] for rank in answer] == ORDER
    assert [rank["score"] for rank in answer] == pytest.approx([sigmoid(logits[i]) for i in ORDER], abs=1e-4)
    raw = ask(client, "/rerank", query=QUERY, texts=DOCUMENTS, raw_scores=True, return_text=True, truncate=True)
    assert [rank["score"] for rank in raw] == pytest.approx([logits[i] for i in ORDER], abs=1e-3)
    assert [rank["text"] for rank in raw] == [DOCUMENTS[i] for i in ORDER]


def test_truncate_false_refuses_what_does_not_fit(client: httpx.Client) -> None:
    texts = ["short", "long " * 600]
    refused = client.post("/rerank", json={"query": QUERY, "texts": texts, "truncate": False})
    assert refused.status_code == 413
    assert refused.json()["error_type"] == "validation"
    assert "texts[1]" in refused.json()["error"]
    assert client.post("/rerank", json={"query": QUERY, "texts": texts}).status_code == 200


def test_refusals_of_texts_are_as_text_embeddings_inference_words_them(client: httpx.Client) -> None:
    refused = client.post("/rerank", json={"query": QUERY, "texts": ["a", 5]})
    assert (refused.status_code, sorted(refused.json())) == (422, ["error", "error_type"])


def test_info_says_that_the_model_is_a_reranker(client: httpx.Client) -> None:
    info = client.get("/info").json()
    assert "reranker" in info["model_type"]
    assert (info["model_id"], info["max_input_length"], info["model_dtype"]) == (NAME, 512, "float32")
    assert info["max_client_batch_size"] == 1000


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
@pytest.mark.parametrize(
    "names", [("text_1", "text_2"), ("queries", "documents"), ("data_1", "data_2"), ("queries", "items")]
)
def test_a_score_keeps_the_order_as_vllm_does(
    client: httpx.Client, path: str, names: tuple[str, str], logits: list[float]
) -> None:
    answer = ask(client, path, **{names[0]: QUERY, names[1]: DOCUMENTS}, model=NAME, encoding_format="float")
    assert [(one["index"], one["object"]) for one in answer["data"]] == [(i, "score") for i in range(3)]
    assert [one["score"] for one in answer["data"]] == pytest.approx(list(map(sigmoid, logits)), abs=1e-4)
    assert (answer["object"], answer["model"]) == ("list", NAME)
    assert sorted(answer) == ["created", "data", "id", "model", "object", "usage"]
    assert answer["usage"]["total_tokens"] > 0


def test_pairs_are_scored_one_by_one(client: httpx.Client, bundled: Reranker) -> None:
    queries = [QUERY, "What is Berlin known for?", QUERY]
    found = ask(client, "/v1/score", text_1=queries, text_2=DOCUMENTS, use_activation=False)["data"]
    expected = bundled.score(list(zip(queries, DOCUMENTS, strict=True)))
    assert [one["score"] for one in found] == pytest.approx(expected, abs=1e-3)


def test_a_single_text_against_a_single_text(client: httpx.Client) -> None:
    (one,) = ask(client, "/score", text_1=QUERY, text_2=DOCUMENTS[1])["data"]
    assert one["score"] > 0.99


def test_models_are_listed_as_openai_does(client: httpx.Client) -> None:
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [(model["id"], model["object"]) for model in listed["data"]] == [(NAME, "model")]


def test_grating_tells_what_an_answer_took(client: httpx.Client) -> None:
    documents = [*DOCUMENTS * 4, "Berlin " * 600]
    account = ask(client, "/rerank", query=QUERY, documents=documents, top_n=2)["grating"]
    assert account["truncated"] == [12]
    assert account["estimated"] == []
    assert 0 < account["compute_share"] < 1
    assert account["tokens"] > 512
    assert "layers" not in account
    full = ask(client, "/rerank", query=QUERY, documents=documents, top_n=2, grating={"pruning": "off"})
    assert full["grating"]["compute_share"] == 1.0


def test_a_higher_target_computes_more(client: httpx.Client) -> None:
    def share(target: float) -> float:
        body = {"query": QUERY, "documents": DOCUMENTS * 7, "top_n": 3, "grating": {"target": target}}
        return ask(client, "/rerank", **body)["grating"]["compute_share"]

    assert share(0.7) < share(0.98)


def test_estimates_are_marked(client: httpx.Client) -> None:
    wishes = {"scores": "estimated"}
    answer = ask(client, "/rerank", query=QUERY, documents=DOCUMENTS * 7, top_n=7, grating=wishes)
    assert set(answer["grating"]["estimated"]) <= {result["index"] for result in answer["results"]}
    assert answer["grating"]["estimated"]


def test_a_trace_has_every_layer(client: httpx.Client) -> None:
    wishes = {"trace": True, "raw_scores": True}
    answer = ask(client, "/rerank", query=QUERY, documents=DOCUMENTS, top_n=1, grating=wishes)
    layers = answer["grating"]["layers"]
    assert layers[0]["alive"] == [0, 1, 2]
    assert all(len(layer["alive"]) == len(layer["routes"]) for layer in layers)
    assert all(len(layer["scores"]) in (0, len(layer["alive"])) for layer in layers)  # not all are looked at
    assert 1 in layers[-1]["alive"]
    assert layers[-1]["scores"][layers[-1]["alive"].index(1)] == answer["results"][0]["relevance_score"]
