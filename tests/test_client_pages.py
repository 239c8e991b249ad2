"""The pages about the server's clients: their code, their commands and their settings reach a real server.

Where a client is a program of its own, it is not run: a request is sent as its source sends it, with the
settings of its page.
"""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.core.serving.conftest import DOCUMENTS, OF_CLIENTS, ORDER, QUERY, real_model, serving

pytestmark = OF_CLIENTS

ROOT = Path(__file__).parent.parent
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("docs/clients/*.md"))}
OTHERS = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/serve.md")}
PLACE = re.compile(r"http://(?:127\.0\.0\.1|host\.docker\.internal):8080")
PACKAGE = re.compile(
    r"^(?:from|import) (cohere|langchain_cohere|litellm|llama_index\.postprocessor\.\w+)\b", re.MULTILINE
)
IN_OUR_TESTS = ("cohere", "langchain-cohere", "litellm", "llamaindex-cohere", "llamaindex-tei", "requests")


def blocks(page: str, language: str) -> list[str]:
    """The blocks of a language on a page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def fields(page: str) -> dict[str, str]:
    """The table of a page whose values are code."""
    return dict(re.findall(r"^\| ([\w -]+) \| `([^`]*)` \|$", PAGES[page], re.MULTILINE))


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving(real_model(), name="reranker") as address:
        yield address


@pytest.mark.parametrize("page", IN_OUR_TESTS)
def test_the_code_of_a_page_ranks_the_right_text_first(
    page: str, server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # otherwise it asks another host
    examples = blocks(PAGES[page], "python")
    for package in PACKAGE.findall("\n".join(examples)):
        pytest.importorskip(package)
    namespace: dict[str, object] = {}
    for example in examples:
        exec(compile(PLACE.sub(server, example), f"{page}.md", "exec"), namespace)
        first = capsys.readouterr().out.splitlines()[0]
        assert "3,520,031" in first or first.startswith("1 ")


def test_a_page_says_whether_it_is_tested() -> None:
    for name, page in PAGES.items():
        (told,) = re.findall(r"^\| tested \| (.*) \|$", page, re.MULTILINE)
        assert told.startswith("yes") is (name in IN_OUR_TESTS)
        assert bool(blocks(page, "python")) is (name in IN_OUR_TESTS)
        assert "\n**Does it work?** " in page
        assert f"(clients/{name}.md)" in OTHERS["docs/serve.md"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=f"{name}-{number}")
        for name, page in {**OTHERS, **PAGES}.items()
        for number, block in enumerate(blocks(page, "bash"))
        if "curl " in block
    ],
)
def test_the_commands_of_a_page_find_the_right_text(block: str, server: str) -> None:
    line = block[block.index("curl ") :].replace("\\\n", " ")
    command = shlex.split(PLACE.sub(server, line))
    told = subprocess.run([*command, "--silent", "--fail"], check=True, capture_output=True, timeout=60).stdout
    answer = json.loads(told)
    ranked = answer if isinstance(answer, list) else answer.get("results") or answer["data"]
    assert max(ranked, key=lambda one: one.get("relevance_score", one.get("score")))["index"] == 1


def test_open_webui(server: str) -> None:
    (block,) = blocks(PAGES["open-webui"], "ini")
    settings = dict(line.split("=", 1) for line in block.splitlines())
    body = {"model": settings["RAG_RERANKING_MODEL"], "query": QUERY, "documents": DOCUMENTS, "top_n": 3}
    url = PLACE.sub(server, settings["RAG_EXTERNAL_RERANKER_URL"])
    headers = {"Authorization": f"Bearer {settings['RAG_EXTERNAL_RERANKER_API_KEY']}"}
    results = httpx.post(url, json=body, headers=headers, timeout=60).raise_for_status().json()["results"]
    scores = [one["relevance_score"] for one in sorted(results, key=lambda one: one["index"])]
    assert sorted(range(3), key=lambda index: -scores[index]) == ORDER


def test_dify(server: str) -> None:
    settings = fields("dify")
    body = {
        "model": settings["Model Name"],
        "query": QUERY,
        "documents": DOCUMENTS,
        "top_n": 3,
        "return_documents": True,
        "score_threshold": 0.8,
    }
    url = PLACE.sub(server, settings["API endpoint URL"]).rstrip("/") + "/rerank"
    answer = httpx.post(url, json=body, headers={"Authorization": "Bearer any"}, timeout=60).raise_for_status()
    results = answer.json()["results"]
    assert [(one["index"], one["document"]["text"]) for one in results] == [(i, DOCUMENTS[i]) for i in ORDER]
    assert answer.json()["usage"]["total_tokens"] > 0
    assert results[0]["relevance_score"] > 0.8 > results[2]["relevance_score"]


def test_ragflow(server: str) -> None:
    cohere = pytest.importorskip("cohere")
    settings = fields("ragflow")
    with cohere.Client(api_key="any", base_url=PLACE.sub(server, settings["Base URL"])) as client:
        answer = client.rerank(
            model=settings["Model name"], query=QUERY, documents=DOCUMENTS, top_n=3, return_documents=False
        )
    assert [result.index for result in answer.results] == ORDER
    assert answer.results[0].document is None


def test_continue(server: str) -> None:
    (block,) = blocks(PAGES["continue"], "yaml")
    (model,) = yaml.safe_load(block)["models"]
    assert (model["provider"], model["roles"]) == ("huggingface-tei", ["rerank"])
    base = PLACE.sub(server, model["apiBase"])
    assert httpx.get(f"{base}/info").raise_for_status().json()["model_id"] == "reranker"
    body: dict[str, Any] = {"query": QUERY, "texts": DOCUMENTS, "return_text": False, "raw_scores": False}
    body |= {"truncation_direction": "Right", "truncate": True}
    headers = {"Authorization": f"Bearer {model['apiKey']}"}
    ranked = httpx.post(f"{base}/rerank", json=body, headers=headers, timeout=60).raise_for_status().json()
    assert [one["index"] for one in ranked] == ORDER
    assert all(0 <= one["score"] <= 1 for one in ranked)


async def test_litellm_reads_the_file_of_its_proxy(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    monkeypatch.setenv("GRATING_API_KEY", "any")
    litellm = pytest.importorskip("litellm")
    (block,) = blocks(PAGES["litellm"], "yaml")
    router = litellm.Router(**yaml.safe_load(PLACE.sub(server, block)))
    answer = await router.arerank(model="reranker", query=QUERY, documents=DOCUMENTS, top_n=2)
    await litellm.close_litellm_async_clients()
    assert [result["index"] for result in answer.results] == ORDER[:2]


def test_cohere_sends_what_only_grating_does(server: str) -> None:
    cohere = pytest.importorskip("cohere")
    (found,) = re.findall(r"`request_options=(\{.*?\})`", PAGES["cohere"])
    wrong = json.loads(found.replace("0.95", "95"))  # a wish that is refused has arrived
    with (
        cohere.ClientV2("any", base_url=server) as client,
        pytest.raises(cohere.UnprocessableEntityError) as refused,
    ):
        client.rerank(model="reranker", query=QUERY, documents=DOCUMENTS, request_options=wrong)
    assert refused.value.body["message"].startswith("grating.target must be less than 1")
