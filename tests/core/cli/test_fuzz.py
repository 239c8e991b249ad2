"""Whatever is typed or fed, the command ends with a result or with a sentence: never with a traceback."""

import json
import random
from functools import cache
from pathlib import Path

import pytest
from typer.main import get_command

from grating_core.cli.output import visible
from tests.core.cli.conftest import grating
from tests.core.conftest import WORDS

PIECES = [
    *WORDS[:20], "\u202e", "\x00", "\x85", "\u2028", "\r", "\n", "\t", ",", '"', "'", "[", "{", "}", "]",
    "\x1b[31m", "\\", "[bold]", ":smile:", "\U0001f600", "é", "\ufeff", "\U000e0061", " ", "", "</s>", "[SEP]",
]  # fmt: skip
OPTIONS = {
    "--top-k": ["1", "3", "100", "0", "-1", "x", "1e3", "9" * 30],
    "--pruning": ["auto", "cluster", "off", "none", "AUTO", ""],
    "--dtype": ["float32", "auto", "bf16", "int8"],
    "--scores": ["exact", "estimated", "rough"],
    "--score-threshold": ["0", "-99", "nan", "inf", "p"],
    "--format": ["table", "json", "jsonl", "xml"],
    "--input-format": ["auto", "jsonl", "json", "csv", "tsv", "lines", "text", "yaml"],
    "--field": ["text", "id", "", "nested"],
    "--id-field": ["id", "text", "none"],
    "--max-length": ["8", "96", "3", "0", "99999999999999999999"],
    "--target": ["0.5", "0.99", "1", "nan"],
    "--guarantee": ["share", "set", "all"],
    "--long-documents": ["truncate", "windows", "drop"],
    "--memory-budget": ["1", "3MB", "500MB", "-1", "MB", "1e9GB"],
    "--device": ["cpu", "cuda:99", "tpu", ""],
    "--template": ["qwen3-reranker", "nothing"],
    "--instruction": ["be strict"],
    "--lens": ["/no/such", "/dev/null"],
    "--adapter": ["/no/such", "./x"],
    "--revision": ["main", "a b", "../.."],
    "--cache-dir": ["/dev/null", "."],
    "--output": ["{folder}/out", "{folder}", "/no/such/out", "/dev/null", "x" * 5000],
    "--unknown": ["x"],
}
FLAGS = ["--json", "--local-files-only", "--nonsense"]


def a_text(chance: random.Random) -> str:
    return "".join(chance.choice(PIECES) + chance.choice(["", " "]) for _ in range(chance.randrange(12)))


def a_file(chance: random.Random) -> bytes:
    texts = [a_text(chance) for _ in range(chance.randrange(6))]
    kind = chance.randrange(8)
    if kind == 0:
        whole = "\n".join(texts)
    elif kind == 1:
        whole = "\n".join(json.dumps({"text": text, "id": number}) for number, text in enumerate(texts))
    elif kind == 2:
        whole = json.dumps([chance.choice([text, {"text": text}, {"body": text}, None, 3]) for text in texts])
    elif kind == 3:
        whole = "id,text\n" + "".join(f'{n},"{text}"\n' for n, text in enumerate(texts))
    elif kind == 4:
        whole = "id\ttext\n" + "".join(f"{n}\t{text}\n" for n, text in enumerate(texts))
    elif kind == 5:
        whole = chance.choice(["[", '{"text": ', '{"a":']) * chance.choice([1, 500, 100_000])
    elif kind == 6:
        whole = '{"text": "\\ud800 w1", "id": NaN}\n{"text": "w2", "x": ' + "[" * 400 + "]" * 400 + "}"
    else:
        return chance.randbytes(chance.randrange(60))
    data = whole.encode("utf-8")
    if chance.random() < 0.2:  # damage
        data = data[: chance.randrange(len(data) + 1)]
    return data


def a_case(chance: random.Random, model: Path, folder: Path) -> tuple[list[str], bytes]:
    data = a_file(chance)
    source = folder / f"d{chance.choice(['', '.txt', '.json', '.jsonl', '.csv', '.tsv'])}"
    source.write_bytes(data)
    command = chance.choice(["rerank"] * 4 + ["explain", "select"])
    query = a_text(chance) if chance.random() < 0.3 else "w1 w2"
    where = chance.choice([str(source)] * 4 + ["-", str(folder), "/no/such", ""])
    arguments = [command, "-q", query, "-i", where, "-m", str(model)]
    if command == "select":
        arguments += ["-n", chance.choice(["1", "20", "0", "x"])]
    for option in chance.sample(sorted(OPTIONS), chance.choice([0, 1, 1, 2, 3])):
        if option.startswith("--") and not (command == "select" and chance.random() < 0.5):
            arguments += [option, chance.choice(OPTIONS[option]).format(folder=folder)]
    if chance.random() < 0.3:
        arguments.append(chance.choice(FLAGS))
    return arguments, data


def try_cases(count: int, seed: int, model: Path, folder: Path) -> None:
    chance = random.Random(seed)
    statuses: dict[int, int] = {}
    for number in range(count):
        arguments, data = a_case(chance, model, folder)
        done = grating(*arguments, stdin=data)
        told = f"case {number} of seed {seed}: {arguments}, {data[:200]!r}\n{done.stderr[-2000:]}"
        assert done.exception is None or isinstance(done.exception, SystemExit), f"{done.exception!r}: {told}"
        assert done.exit_code in (0, 2), told
        assert "Traceback" not in done.stderr, told
        assert (done.exit_code == 0) or done.stderr.strip(), told  # a refusal says why
        assert arguments[0] == "select" or visible(done.stdout) == done.stdout, told
        statuses[done.exit_code] = statuses.get(done.exit_code, 0) + 1
    assert min(statuses[0], statuses[2]) > count // 20  # both happen


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRATING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("typer.testing._get_command", cache(get_command))  # it takes longer than most cases
    return tmp_path


def test_no_traceback_whatever_is_typed_or_fed(tiny_bert: Path, folder: Path) -> None:
    try_cases(300, 1, tiny_bert, folder)


@pytest.mark.slow
def test_no_traceback_in_many_more_cases(tiny_bert: Path, folder: Path) -> None:
    try_cases(2000, 2, tiny_bert, folder)
