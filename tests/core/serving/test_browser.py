"""The page in a real browser, against the real model. GRATING_PICTURE names a folder for pictures of it."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.core.conftest import BUNDLED
from tests.core.serving.conftest import DOCUMENTS, QUERY, real_model, serving
from tests.core.serving.test_process import command

playwright = pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright")
expect = playwright.expect

PHONE = {"width": 360, "height": 740}
HOSTILE = "<img src=x onerror=\"document.title='taken'\"> lives in Berlin </script><b>bold</b>"
PICTURE = os.environ.get("GRATING_PICTURE")

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    programs = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    program = next(filter(None, programs), None)
    if program is None:
        pytest.skip("there is no Chromium here")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A window, of a size and a scheme that a test may choose."""
    context = browser.new_context(**getattr(request, "param", {}))
    yield context
    context.close()


@pytest.fixture
def page(context: Any, address: str) -> Iterator[Any]:
    """The page, which asks no other host and breaks no rule of its own policy."""
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda one: None if one.url.startswith((address, "data:")) else complaints.append(one.url))
    page.goto(address)
    yield page
    assert complaints == []


def ask(page: Any, query: str = QUERY, documents: str = "\n\n".join(DOCUMENTS)) -> None:
    page.get_by_label("Question").fill(query)
    page.get_by_label("Documents", exact=True).fill(documents)
    page.get_by_role("button", name="Rank").click()
    expect(page.get_by_role("status")).to_contain_text("Ranked")


def texts(page: Any) -> list[str]:
    return page.locator("#ranking .text").all_text_contents()


def fits(page: Any) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def contrast(page: Any, selector: str) -> float:
    """The contrast of a text with what lies behind it, as WCAG defines it."""
    return page.evaluate(
        """selector => {
            const light = (colour) => {
                const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map((part) => part / 255)
                    .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            const element = document.querySelector(selector);
            let behind = element;
            while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
            const both = [light(getComputedStyle(element).color), light(getComputedStyle(behind).backgroundColor)];
            return (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
        }""",
        selector,
    )


def test_a_question_is_answered_with_a_ranking(page: Any, client: httpx.Client) -> None:
    ask(page)
    answer = client.post("/rerank", json={"query": QUERY, "documents": DOCUMENTS}).json()
    assert texts(page) == [DOCUMENTS[result["index"]] for result in answer["results"]]
    scores = page.locator("#ranking .score").all_text_contents()
    assert [float(score) for score in scores] == [
        pytest.approx(result["relevance_score"], abs=6e-4) for result in answer["results"]
    ]
    meters = page.locator("#ranking .meter").evaluate_all(
        "all => all.map(one => one.firstChild.getBoundingClientRect().width / one.getBoundingClientRect().width)"
    )
    assert meters == [pytest.approx(float(score), abs=0.02) for score in scores]


@slow
def test_the_sample_shows_who_was_dropped_when(page: Any, client: httpx.Client) -> None:
    page.get_by_role("button", name="Use the sample").click()
    page.get_by_role("button", name="Rank").click()
    expect(page.get_by_role("status")).to_contain_text("Ranked 24 documents")
    assert len(texts(page)) == 5
    assert "24 documents" in page.locator("#count").inner_text()

    documents = page.get_by_label("Documents", exact=True).input_value().split("\n\n")
    query = page.get_by_label("Question").input_value()
    body = {"query": query, "documents": documents, "top_n": 5, "grating": {"trace": True}}
    layers = client.post("/rerank", json=body).json()["grating"]["layers"]
    dropped = {
        index: layer["layer"]
        for layer in layers
        for index, route in zip(layer["alive"], layer["routes"], strict=True)
        if route == "dropped"
    }
    assert len(dropped) > 10
    assert page.locator("#chart .cross").count() == len(dropped)
    assert page.locator("#chart .won").count() == 5
    assert page.locator("#dropped").inner_text() == f"{len(dropped)} of 24"
    for title in ("Layer", "Provisional score"):
        assert page.locator("#chart .axis", has_text=re.compile(f"^{title}$")).count() == 1

    page.get_by_text("The same as a table").click()
    rows = page.locator("#numbers tbody tr")
    expect(rows).to_have_count(24)
    for index, layer in dropped.items():
        cells = rows.filter(has_text=re.compile(rf"^{index + 1}\. "))
        expect(cells).to_contain_text("dropped before the first" if layer == 0 else f"dropped after layer {layer}")
    for place in range(24):  # a score for each layer that the document went through
        row = rows.nth(place)
        index = int(row.locator("th").inner_text().split(".")[0]) - 1
        shown = [float(cell) for cell in row.locator("td").all_inner_texts()[1:] if cell]
        computed = [layer["scores"][layer["alive"].index(index)] for layer in layers if index in layer["alive"]]
        assert shown == pytest.approx(computed, abs=6e-3)


@slow
def test_what_pruning_saves_is_measured(page: Any) -> None:
    page.get_by_role("button", name="Use the sample").click()
    page.get_by_role("button", name="Rank").click()
    expect(page.get_by_role("status")).to_contain_text("Ranked")
    with page.expect_request(lambda request: request.method == "POST") as sent:
        page.get_by_role("button", name="Compare with unpruned").click()
    assert sent.value.post_data_json["grating"] == {"pruning": "off"}
    expect(page.locator("#verdict")).to_contain_text("best 5 documents are the same")
    numbers = page.locator("#bars .number").all_inner_texts()
    assert numbers[2] == page.locator("#share").inner_text()
    assert numbers[3] == "100 %"
    assert int(numbers[2].split()[0]) < 80


@slow
def test_files_are_read_as_their_formats_say(page: Any) -> None:
    def file(name: str, content: str | bytes) -> dict[str, Any]:
        return {"name": name, "mimeType": "", "buffer": content.encode() if isinstance(content, str) else content}

    upload = page.get_by_label("Documents from files")
    upload.set_input_files(
        [
            file("a.jsonl", '{"text": "Berlin had 3,520,031 inhabitants.", "id": 7}\n\n"A string"\n'),
            file("b.md", "# Museums\n\nBerlin has many.\n\n```\n# no heading\n```\n## Food\nCurry sausage."),
            file("c.txt", "One paragraph\nin two lines.\r\n\r\nAnother one."),
        ]
    )
    expect(page.locator("#count")).to_have_text("6 documents in all.")
    page.get_by_label("Question").fill(QUERY)
    page.get_by_role("button", name="Rank").click()
    expect(page.get_by_role("status")).to_contain_text("Ranked 6 documents")
    assert texts(page)[0] == "Berlin had 3,520,031 inhabitants."
    assert "# Museums\n\nBerlin has many.\n\n```\n# no heading\n```" in texts(page)
    expect(page.locator("#ranking .hint").first).to_contain_text("a.jsonl")

    page.get_by_role("button", name="Remove c.txt").click()
    expect(page.locator("#count")).to_have_text("4 documents in all.")
    upload.set_input_files([file("d.png", b"\x89PNG\xff\xfe")])
    expect(page.get_by_role("status")).to_contain_text("d.png is not a text in UTF-8.")
    upload.set_input_files([file("e.jsonl", '{"text": "fine"}\n{"title": "no text"}')])
    page.get_by_role("button", name="Rank").click()
    expect(page.get_by_role("status")).to_contain_text('Line 2 of e.jsonl has no "text".')


def test_hostile_text_stays_text(page: Any) -> None:
    ask(page, query=f"Who lives in Berlin? {HOSTILE}", documents=f"{HOSTILE}\n\nNobody.")
    page.locator("#numbers summary").click()
    page.locator("#ranking summary").first.hover()
    assert HOSTILE in texts(page)
    assert page.locator("img, b b, main script").count() == 0
    assert page.title() == "grating"


def test_what_is_missing_is_said_in_a_sentence(page: Any) -> None:
    status = page.get_by_role("status")
    page.get_by_role("button", name="Rank").click()
    expect(status).to_have_text("Write a question first.")
    expect(page.get_by_label("Question")).to_be_focused()
    page.get_by_label("Question").fill(QUERY)
    page.keyboard.press("Enter")
    expect(status).to_contain_text("There are no documents yet.")
    page.get_by_label("Documents", exact=True).fill("One.")
    page.get_by_label("How many").fill("0")
    page.keyboard.press("Control+Enter")
    expect(status).to_contain_text("a whole number from 1")


def test_a_refusal_is_shown_as_the_servers_sentence(context: Any, address: str) -> None:
    page = context.new_page()
    page.goto(address)
    page.get_by_label("Question").fill("why " * 600)
    page.get_by_label("Documents", exact=True).fill("One.")
    page.get_by_role("button", name="Rank").click()
    expect(page.get_by_role("status")).to_contain_text("Query has 600 tokens, which leaves no room")
    expect(page.locator("#results")).to_be_hidden()


@slow
def test_the_key_is_asked_for(context: Any) -> None:
    with serving(real_model(), api_key="schlüssel%") as address:
        page = context.new_page()
        page.goto(address)
        key = page.get_by_label("API key")
        expect(key).to_be_visible()
        page.get_by_role("button", name="Use the sample").click()
        for shown, told in (("", "The server asks"), ("wrong", "The key is not"), ("ключ", "The key is not")):
            key.fill(shown)
            page.get_by_role("button", name="Rank").click()
            expect(page.get_by_role("status")).to_contain_text(told)
            expect(key).to_be_focused()
        key.fill("schlüssel%")
        page.get_by_role("button", name="Rank").click()
        expect(page.get_by_role("status")).to_contain_text("Ranked 24 documents")


@slow
def test_the_models_are_offered(context: Any) -> None:
    with command("--name", "first", "--also", f"second={BUNDLED}") as (_, address):
        page = context.new_page()
        page.goto(address)
        page.get_by_label("Model").select_option("second")
        with page.expect_request(lambda request: request.method == "POST") as sent:
            ask(page)
        assert sent.value.post_data_json["model"] == "second"


@slow
def test_all_of_it_works_with_the_keyboard(page: Any) -> None:
    def reach(name: str) -> None:
        for _ in range(30):
            page.keyboard.press("Tab")
            if page.evaluate(
                "(e => e.labels?.[0]?.textContent ?? e.textContent)(document.activeElement)"
            ).startswith(name):
                outline = page.evaluate("getComputedStyle(document.activeElement).outline")
                assert "3px" in outline
                return
        raise AssertionError(name)

    reach("Use the sample")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Rank")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_contain_text("Ranked")
    reach("Compare with unpruned")
    page.keyboard.press("Space")
    expect(page.locator("#comparison")).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.locator("#chart .on")).to_have_count(1)
    expect(page.locator("#caption")).to_contain_text("in place 1")
    page.keyboard.press("Enter")
    expect(page.locator("#ranking .hint").first).to_be_visible()
    reach("The same as a table")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    expect(page.get_by_role("region", name="Scores by layer")).to_be_focused()


@slow
def test_a_request_can_be_stopped(page: Any) -> None:
    page.get_by_label("Question").fill(QUERY)
    many = [f"{number} {text}" for number in range(60) for text in DOCUMENTS]
    page.get_by_label("Documents", exact=True).fill("\n\n".join(many))
    page.get_by_role("button", name="Rank").click()
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("status")).to_have_text("Stopped.")
    expect(page.get_by_role("button", name="Rank")).to_be_visible()


@slow
@pytest.mark.parametrize(
    "context",
    [
        {"viewport": PHONE, "is_mobile": True, "has_touch": True},
        {"color_scheme": "dark"},
        {"color_scheme": "light"},
    ],
    ids=["phone", "dark", "light"],
    indirect=True,
)
def test_the_page_can_be_read(page: Any, request: pytest.FixtureRequest) -> None:
    page.get_by_role("button", name="Use the sample").click()
    page.get_by_role("button", name="Rank").click()
    expect(page.get_by_role("status")).to_contain_text("Ranked")
    page.get_by_role("button", name="Compare with unpruned").click()
    expect(page.locator("#comparison")).to_be_visible()
    page.locator("#numbers summary").click()
    assert fits(page)
    for selector in (
        "h1",
        "header p",
        "#count",
        "#ask",
        "#status",
        "#verdict",
        ".rank",
        ".text",
        ".legend li",
        "dt",
    ):
        assert contrast(page, selector) >= 4.5, selector
    dark = request.node.callspec.id == "dark"
    assert page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") == dark
    page.locator("#numbers summary").click()
    if PICTURE:
        name = request.node.callspec.id.replace("light", "serve")
        page.screenshot(path=Path(PICTURE) / f"{name}.png", full_page=True)
