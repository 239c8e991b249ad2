"""Real clients, unchanged: each is told the server's address and asks the question about Berlin."""

from typing import Any

import httpx
import pytest

from tests.core.serving.conftest import DOCUMENTS, NAME, OF_CLIENTS, ORDER, QUERY

pytestmark = OF_CLIENTS

KEY = "any"


def test_cohere_version_1(address: str) -> None:
    cohere = pytest.importorskip("cohere")
    with cohere.Client(KEY, base_url=address) as client:
        answer = client.rerank(query=QUERY, documents=DOCUMENTS, model=NAME, top_n=2)
    assert [result.index for result in answer.results] == ORDER[:2]
    assert answer.results[0].relevance_score > 0.99
    assert answer.results[0].document.text == DOCUMENTS[1]
    assert answer.meta.api_version.version == "1"


def test_cohere_version_2(address: str) -> None:
    cohere = pytest.importorskip("cohere")
    with cohere.ClientV2(KEY, base_url=address) as client:
        answer = client.rerank(query=QUERY, documents=DOCUMENTS, model=NAME)
    assert [result.index for result in answer.results] == ORDER
    assert answer.meta.billed_units.search_units == 1


async def test_cohere_asynchronous(address: str) -> None:
    cohere = pytest.importorskip("cohere")
    async with cohere.AsyncClientV2(KEY, base_url=address) as client:
        answer = await client.rerank(query=QUERY, documents=DOCUMENTS, model=NAME, top_n=1)
    assert [result.index for result in answer.results] == ORDER[:1]


def test_cohere_reads_the_sentence_of_a_refusal(address: str) -> None:
    cohere = pytest.importorskip("cohere")
    with cohere.ClientV2(KEY, base_url=address) as client:
        with pytest.raises(cohere.UnprocessableEntityError) as refused:
            client.rerank(query=" ", documents=DOCUMENTS, model=NAME)
        with pytest.raises(cohere.NotFoundError):
            client.rerank(query=QUERY, documents=DOCUMENTS, model="other")
    assert refused.value.body["message"] == "query must not be blank"


def test_langchain_cohere(address: str) -> None:
    langchain_cohere = pytest.importorskip("langchain_cohere")
    from langchain_core.documents import Document

    compressor = langchain_cohere.CohereRerank(base_url=address, cohere_api_key=KEY, model=NAME, top_n=2)
    documents = [Document(page_content=text, metadata={"n": n}) for n, text in enumerate(DOCUMENTS)]
    found = compressor.compress_documents(documents, QUERY)
    assert [document.metadata["n"] for document in found] == ORDER[:2]
    assert found[0].metadata["relevance_score"] > 0.99


def _nodes() -> list[Any]:
    from llama_index.core.schema import NodeWithScore, TextNode

    return [NodeWithScore(node=TextNode(text=text, id_=str(n))) for n, text in enumerate(DOCUMENTS)]


def test_llama_index_for_text_embeddings_inference(address: str) -> None:
    tei = pytest.importorskip("llama_index.postprocessor.tei_rerank")
    found = tei.TextEmbeddingInference(base_url=address, top_n=2).postprocess_nodes(_nodes(), query_str=QUERY)
    assert [node.node.node_id for node in found] == [str(index) for index in ORDER[:2]]
    assert found[0].score > 0.99


def test_llama_index_for_cohere(address: str) -> None:
    postprocessor = pytest.importorskip("llama_index.postprocessor.cohere_rerank")
    client = postprocessor.CohereRerank(api_key=KEY, base_url=address, model=NAME, top_n=2)
    found = client.postprocess_nodes(_nodes(), query_str=QUERY)
    assert [node.node.node_id for node in found] == [str(index) for index in ORDER[:2]]


@pytest.mark.parametrize(
    ("provider", "base"),
    [("cohere", "/v2/rerank"), ("hosted_vllm", ""), ("jina_ai", "/v1/rerank")],
)
def test_litellm(address: str, provider: str, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # otherwise it asks another host
    litellm = pytest.importorskip("litellm")
    answer = litellm.rerank(
        model=f"{provider}/{NAME}", query=QUERY, documents=DOCUMENTS, top_n=2, api_base=address + base, api_key=KEY
    )
    assert [result["index"] for result in answer.results] == ORDER[:2]
    assert answer.results[0]["relevance_score"] > 0.99


def test_requests_as_jinas_documentation_writes_them(address: str) -> None:
    requests = pytest.importorskip("requests")
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    data = {"model": NAME, "query": QUERY, "top_n": 3, "documents": DOCUMENTS, "return_documents": False}
    answer = requests.post(f"{address}/v1/rerank", headers=headers, json=data, timeout=60).json()
    assert [result["index"] for result in answer["results"]] == ORDER
    assert answer["usage"]["total_tokens"] > 0


def test_requests_as_vllms_documentation_writes_them(address: str) -> None:
    requests = pytest.importorskip("requests")
    headers = {"accept": "application/json", "Content-Type": "application/json"}
    data = {"model": NAME, "query": QUERY, "documents": DOCUMENTS}
    answer = requests.post(f"{address}/v1/rerank", headers=headers, json=data, timeout=60).json()
    assert answer["results"][0] == {
        "index": 1,
        "document": {"text": DOCUMENTS[1]},
        "relevance_score": answer["results"][0]["relevance_score"],
    }
    scored = {"model": NAME, "encoding_format": "float", "text_1": QUERY, "text_2": DOCUMENTS}
    found = requests.post(f"{address}/v1/score", headers=headers, json=scored, timeout=60).json()
    assert max(found["data"], key=lambda one: one["score"])["index"] == 1


def test_open_webui(address: str) -> None:
    body = {"model": NAME, "query": QUERY, "documents": DOCUMENTS, "top_n": len(DOCUMENTS)}
    answer = httpx.post(f"{address}/v1/rerank", json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
    ranked = sorted(answer.json()["results"], key=lambda result: result["index"])
    scores = [result["relevance_score"] for result in ranked]
    assert sorted(range(3), key=lambda index: -scores[index]) == ORDER
