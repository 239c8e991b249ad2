"""grating bench, on a tiny model and texts of its words."""

import json
import random
from pathlib import Path

import pytest

from grating_core.cli.bench import verdict
from grating_core.lab.peers import (
    OPENVINO,
    PRUNED,
    SENTENCE_TRANSFORMERS,
    UNPRUNED,
    Job,
    Measured,
    agreement,
    measure,
)
from grating_core.settings import RerankSettings
from tests.core.cli.conftest import grating
from tests.core.conftest import WORDS
from tests.core.parity import random_text


def test_agreement_is_the_share_of_the_references_top_k() -> None:
    reference = Measured("a", rankings=([1, 2], [3, 4]))
    assert agreement(reference, reference) == 1
    assert agreement(Measured("b", rankings=([2, 1], [4, 5])), reference) == 0.75


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.5, "2.0 times as fast as the fastest other (OpenVINO)"), (1.5, "slower by 50% than the fastest other")],
)
def test_the_closing_line_is_honest(seconds: float, told: str) -> None:
    job = Job(RerankSettings(model="m"), "m", [("q", ["d"])], top_k=1, rounds=1, threads=1, max_length=8)
    peers = [
        Measured(SENTENCE_TRANSFORMERS, seconds=4.0, rankings=([0],)),
        Measured(OPENVINO, seconds=1.0, rankings=([0],)),
    ]
    ours = [Measured(UNPRUNED, error="RuntimeError: no"), Measured(PRUNED, seconds=seconds, rankings=([1],))]
    line = verdict(job, [*peers, *ours])
    assert line is not None
    assert told in line
    assert "0.0% of the reference's top 1" in line
    assert verdict(job, ours[:1]) is None


@pytest.mark.slow
def test_a_system_that_fails_is_told_and_the_others_go_on(tiny_bert: Path) -> None:
    requests = [("w1 w2", ["w3 w4", "w1 w2"])]
    settings = RerankSettings(model=tiny_bert, device="cpu")
    job = Job(settings, "./nowhere", requests, top_k=1, rounds=1, threads=1, max_length=96)
    failed, found = measure(job, [SENTENCE_TRANSFORMERS, UNPRUNED])
    assert failed.error is not None
    assert "nowhere" in failed.error
    assert found.error is None
    assert found.seconds > 0


@pytest.mark.slow
def test_systems_are_measured_on_the_users_texts_and_agree(tiny_bert: Path, tmp_path: Path) -> None:
    source = random.Random(3)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(random_text(source.randint(6, 30), source, WORDS) for _ in range(30)), "utf-8")
    asked = ["bench", str(tiny_bert), "--corpus", str(corpus), "--candidates", "6", "-k", "2", "--requests", "2"]
    done = grating(*asked, "--rounds", "2", "--threads", "1", "--dtype", "float32", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["requests"], found["candidates"], found["top_k"], found["threads"]) == (2, 6, 2, 1)
    assert found["reference"] == "sentence-transformers"
    systems = {system["system"]: system for system in found["systems"]}
    assert {"sentence-transformers", "grating, unpruned", "grating"} <= set(systems)
    assert systems["grating, unpruned"]["agreement"] == 1
    for system in systems.values():
        assert system["error"] is None
        assert system["seconds"] > 0
        assert system["peak_memory"] > 50_000_000
    assert "batch_size=" in systems["sentence-transformers"]["setting"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--corpus", "/no/such"], "/no/such"),
        (["--corpus", "{corpus}", "--candidates", "20"], "too few for requests of 20"),
        (["--corpus", "{corpus}", "--rounds", "0"], "--rounds"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    options: list[str], told: str, tiny_bert: Path, tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("w1\nw2\nw3", encoding="utf-8")
    done = grating("bench", str(tiny_bert), *(option.format(corpus=corpus) for option in options))
    assert done.exit_code == 2
    assert told in done.stderr
