"""The README is short, its links lead somewhere, and its examples do what it says."""

import re
from pathlib import Path

import pytest

from tests.tiny_chat import save_chat_model

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_examples_run_one_after_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    examples = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(examples) == 4
    namespace: dict[str, object] = {}
    for example in examples:
        exec(compile(example, "README.md", "exec"), namespace)
        assert "3,520,031" in capsys.readouterr().out.splitlines()[0]


def test_the_example_of_generating_runs_with_a_small_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = re.findall(r"```py\n(.*?)```", README, flags=re.DOTALL)
    example, names = re.subn(r'"Qwen/[\w.-]+"', repr(str(save_chat_model(tmp_path))), example)
    assert names == 1
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_a_newcomer_finishes_it() -> None:
    assert len(README.splitlines()) <= 170
    assert len(README.encode()) <= 11_000


def test_its_links_lead_to_files() -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)[^)]*\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
