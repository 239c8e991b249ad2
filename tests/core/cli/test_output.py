"""Text that others wrote, on its way to a terminal, a pipe, a file."""

import io
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from grating_core.cli.commands import app
from grating_core.cli.output import show, tell_error, visible, write_json, write_text
from grating_core.cli.tables import ranking_table
from grating_core.results import Highlight, RankedDocument, RerankResult, Trace
from tests.core.cli.conftest import DOCUMENTS, QUERY, grating

TRICKS = {
    "\x1b[31mred": r"\x1b[31mred",
    "\x1b]0;title\x07": r"\x1b]0;title\x07",
    "\x1b]8;;http://example.org\x1b\\link\x1b]8;;\x1b\\": r"\x1b]8;;http://example.org\x1b\link\x1b]8;;\x1b"
    + "\\",
    "\x1b[2J\x1bc": r"\x1b[2J\x1bc",
    "\x1b]52;c;ZXZpbA==\x07": r"\x1b]52;c;ZXZpbA==\x07",
    "\x9b31m\x9d0;t\x9c": r"\x9b31m\x9d0;t\x9c",
    "safe\rgone\x08\x7f": r"safe\rgone\x08\x7f",
    "a\u202egnp.exe\u2066b\u2069\u200f": r"a\u202egnp.exe\u2066b\u2069\u200f",
    "pass\u200bword\ufeff\u2060\xad": r"pass\u200bword\ufeff\u2060\xad",
    "pay\u200dpal": r"pay\u200dpal",
    "tag\U000e0061\ufe0f\ufe01": "tag" + r"\U000e0061" + "\ufe0f" + r"\ufe01",
    "lone \ud800": r"lone \ud800",
    "\u2028\u2029\u3164": r"\u2028\u2029\u3164",
}
PLAIN = [
    "a\tb\nc",
    "[bold]text[/bold] :smile: [demo]",
    "👩\u200d👩\u200d👧 ❤\ufe0f",
    "می\u200cخواهم",
    "क्\u200dष",
    "naïve",
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("text", "shown"), TRICKS.items())
def test_what_a_terminal_would_obey_or_hide_is_shown_as_text(text: str, shown: str) -> None:
    assert visible(text) == shown


@pytest.mark.parametrize("text", PLAIN)
def test_other_text_is_as_it_was(text: str) -> None:
    assert visible(text) == text
    assert visible("one\r\ntwo") == "one\ntwo"


def test_no_way_to_a_terminal_lets_an_escape_through(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    text = "".join(TRICKS) + "[demo]"
    write_text(text)
    show(text)
    write_json({"text": text})
    tell_error(text)
    for written in (out.getvalue(), err.getvalue()):
        # Colours are ours; nothing else of what a terminal would obey is left.
        ours = written.replace("\x1b[31m", "", 1).replace("\x1b[0m", "")
        assert visible(ours) == ours
        assert "[demo]" in written


def test_a_pipe_gets_the_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    text = "".join(trick for trick in TRICKS if "\ud800" not in trick)
    write_text(text)
    assert capsys.readouterr().out == text


def test_json_is_exact_and_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    write_json([*TRICKS, *PLAIN])
    written = capsys.readouterr().out
    assert visible(written) == written
    assert json.loads(written) == [*TRICKS, *PLAIN]
    assert "naïve" in written


@pytest.mark.parametrize("charset", ["ascii", "latin-1", "utf-16-le"])
@pytest.mark.parametrize("option", ["--json", "--format=jsonl", "--format=table"])
def test_standard_output_of_another_encoding(tiny_bert: Path, charset: str, option: str, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    texts = ["Straße 東京 \U0001f600", "lone \ud800 surrogate"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    done = CliRunner(charset=charset).invoke(
        app, ["rerank", "-q", "w1", "-i", str(path), "-m", str(tiny_bert), option]
    )
    assert done.exit_code == 0, done.stderr
    written = done.stdout_bytes.decode(charset)
    if option == "--json":
        assert {entry["text"] for entry in json.loads(written)["ranking"]} == set(texts)
    elif option == "--format=jsonl":
        assert {json.loads(line)["text"] for line in written.splitlines()} == set(texts)
    else:
        assert r"\ud800" in written


@pytest.mark.parametrize("command", ["rerank", "explain"])
def test_documents_with_escapes_are_ranked_and_shown_as_text(
    command: str, tiny_bert: Path, tmp_path: Path
) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(json.dumps({"text": trick, "id": trick}) for trick in TRICKS), encoding="utf-8")
    done = grating(command, "-q", "w1", "-i", str(path), "-m", str(tiny_bert), "-k", "20")
    assert done.exit_code == 0, done.stderr
    assert visible(done.stdout) == done.stdout


def test_highlights_are_in_colour_and_let_no_escape_through(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Nothing at all.\x1b[2J Here is \x1b]0;it\x07. " + "Words of no use. " * 30
    best, other = text.index("Here"), text.rindex("Words")
    highlights = (Highlight(best, best + 16, 1.0), Highlight(other, other + 16, 0.6))
    ranked = RankedDocument(0, 1.0, text, 0.7, highlights=highlights)
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", terminal)
    show(ranking_table(RerankResult([ranked], Trace((), 1, (), (), 0.0))), whole=True)
    shown = terminal.getvalue()
    assert r"\x1b[2J" in shown
    assert "\x1b[2J" not in shown
    assert "\x1b[1;32mHere is \\x1b]0;it" in shown


def test_output_is_written_whole_and_tried_first(tiny_bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "best.jsonl"
    asked = ["rerank", "-q", QUERY, "-i", "-", "-m", str(tiny_bert), "--format", "jsonl"]
    done = grating(*asked, "-o", str(path), stdin="\n".join(DOCUMENTS))
    assert (done.exit_code, done.stdout) == (0, "")
    assert {json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()} == set(DOCUMENTS)
    assert [entry.name for entry in tmp_path.iterdir()] == ["best.jsonl"]
    for place in (tmp_path, tmp_path / "no" / "such"):
        refused = grating(*asked[:6], "./nowhere", "-o", str(place))
        assert refused.exit_code == 2
        assert "--output" in refused.stderr  # not the model, which comes later
    kept = path.read_bytes()
    assert grating(*asked[:4], "-", "-m", "./nowhere", "-o", str(path), stdin="w1").exit_code == 2
    assert path.read_bytes() == kept
    grating(*asked[:6], str(tiny_bert), "-o", str(path), stdin="\n".join(DOCUMENTS))
    assert "3 documents" in path.read_text(encoding="utf-8")  # the table


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="no /dev/fd")
def test_output_goes_to_devices_pipes_and_what_a_shell_has_opened(
    tiny_bert: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = ["rerank", "-q", QUERY, "-i", "-", "-m", str(tiny_bert), "--format", "jsonl", "-o"]
    everything = "\n".join(DOCUMENTS)
    (tmp_path / "expected").touch()
    assert grating(*asked, str(tmp_path / "expected"), stdin=everything).exit_code == 0
    expected = (tmp_path / "expected").read_text(encoding="utf-8")
    assert grating(*asked, "/dev/stdout", stdin=everything).exit_code == 0
    assert capfd.readouterr().out == expected
    log = tmp_path / "log"
    log.write_text("before\n", encoding="utf-8")
    opened = os.open(log, os.O_WRONLY | os.O_APPEND)
    assert grating(*asked, f"/dev/fd/{opened}", stdin=everything).exit_code == 0
    assert os.fstat(opened).st_ino == log.stat().st_ino
    os.close(opened)
    assert log.read_text(encoding="utf-8") == "before\n" + expected
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor() as readers:
        read = readers.submit(pipe.read_text, encoding="utf-8")
        assert grating(*asked, str(pipe), stdin=everything).exit_code == 0
        assert read.result() == expected
    assert grating(*asked, "/dev/null", stdin=everything).exit_code == 0
    full = grating(*asked, "/dev/full", stdin=everything)
    assert (full.exit_code, full.stderr) == (2, "Error: /dev/full: No space left on device\n")
    assert sorted(place.name for place in tmp_path.iterdir()) == ["expected", "log", "pipe"]
