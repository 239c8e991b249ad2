"""The page as it is sent. What it does in a browser is in test_browser.py."""

import re
from base64 import b64encode
from hashlib import sha256

import httpx


def test_the_page_allows_only_its_own_style_and_script(client: httpx.Client) -> None:
    answer = client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert re.findall(r"""(?:src|href)=["'](?!data:)([^"']+)""", answer.text) == ["docs"]
    for block, rule in (("style", "style-src"), ("script", "script-src")):
        (text,) = re.findall(rf"<{block}>(.*?)</{block}>", answer.text, re.DOTALL)
        assert f"{rule} 'sha256-{b64encode(sha256(text.encode()).digest()).decode()}';" in policy
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert sink not in answer.text
