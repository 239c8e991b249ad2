"""The benchmarks of generating measure what they say, on a tiny model; llama.cpp only where it is installed."""

import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import generation, llama_cpp, perplexity, quantised, streaming
from benchmarks.shapes import find_or_write, rescale_channels
from benchmarks.worker import Answer, System, loaded, take_turns
from grating_core.lab.decoders import load_decoder
from grating_core.lab.quality import evaluate
from grating_core.memory.pieces import Pieces
from tests.core.conftest import DECODER, SIZES, randomise
from tests.tiny_chat import save_chat_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat"))


def test_a_model_in_a_process_of_its_own_is_timed(directory: Path) -> None:
    _, tokenizer = load_decoder(directory)
    prompts = [" ".join(f"w{i % 180}" for i in range(length)) for length in (3, 40)]
    questions = [(prompt, tokenizer(prompt)["input_ids"], 4) for prompt in prompts]
    system = System("grating", generation.load_grating, {"directory": directory, "threads": 1})
    with loaded([system]) as workers:
        answers = take_turns(workers, questions, rounds=2)
    (row,) = generation.reduce(answers, {"grating": 6.0}, (3, 40), {})
    assert row["peak_mb"] == 6
    assert row["tokens_per_second_3"] > 0
    assert 0 < row["seconds_to_first_40"] < 5
    assert row["tokens_per_second_3_times"] is None


def test_ratios_are_those_of_the_same_round() -> None:
    def asked(*found: tuple[float, float]) -> list[list[Answer]]:
        return [[Answer({"tokens_per_second": rate, "seconds_to_first": first}, 0, None) for rate, first in found]]

    answers = {"ours": asked((20, 1), (40, 2), (90, 3)), "theirs": asked((10, 2), (20, 4), (90, 9))}
    ours, theirs = generation.reduce(answers, {"ours": 1, "theirs": 1}, (500,), {"ours": "theirs"})
    assert (ours["tokens_per_second_500"], ours["tokens_per_second_500_times"]) == (40, 2)
    assert (ours["seconds_to_first_500"], ours["seconds_to_first_500_times"]) == (2, 2)
    assert theirs["tokens_per_second_500_times"] is None


@pytest.mark.parametrize("quickly", [False, True])
def test_a_slow_disk_reads_the_same_bytes_as_slowly_as_it_says(tmp_path: Path, quickly: bool) -> None:
    data = np.random.default_rng(0).bytes(40_000)
    (tmp_path / "file").write_bytes(data)
    disk = streaming.SlowDisk(rate=200_000, reads=1000)
    found = np.zeros(40_000, dtype=np.uint8)
    with (tmp_path / "file").open("rb", buffering=0) as file, ThreadPoolExecutor(2) as pool:

        def read(part: int) -> int:
            starts = 20_000 * part + np.array([0, 12_000])
            pieces = Pieces(starts, np.array([12_000, 8_000]), found, starts)
            if quickly:
                return disk.begin_reading(file.fileno(), pieces).wait()
            return disk.read_at(file, 20_000 * part, [memoryview(found)[20_000 * part :][:20_000]])  # type: ignore[arg-type]

        started = time.perf_counter()
        assert sum(pool.map(read, range(2))) == (4 if quickly else 40_000)
        assert time.perf_counter() - started >= 0.2
    assert found.tobytes() == data
    assert disk.seconds(10) == 1 / 1000  # few bytes take a read


def test_half_of_the_weights_fit_into_the_budget(directory: Path) -> None:
    case = streaming.Case()
    weights, budget = streaming.find_sizes(directory, case)
    assert weights == sum(
        weight.nbytes for weight in load_decoder(directory, dtype=torch.bfloat16)[0].parameters()
    )
    everything = streaming.find_everything(directory, case)
    assert budget == everything - weights // 2


def test_a_model_within_a_budget_says_what_it_reads(directory: Path) -> None:
    case = streaming.Case()
    settings = {**streaming.settings_of(case), "memory_budget": streaming.find_smallest(directory, case)}
    ask = streaming.load_grating(lambda: None, directory=directory, threads=1, **settings)
    facts = ask(("w1 w2", 3, 0))
    assert facts["read_mb_per_token"] > 0
    assert facts["tokens_per_second"] > 0
    assert facts["planned_mb"] > 10


def test_texts_are_drawn_by_seeds(directory: Path, tmp_path: Path) -> None:
    for name in quantised.COLLECTIONS:
        (tmp_path / name / "qrels").mkdir(parents=True)
        lines = [f'{{"_id": "{i}", "title": "w{i}", "text": "{f"w{i} " * 20}"}}' for i in range(90)]
        (tmp_path / name / "corpus.jsonl").write_text("\n".join(lines))
        (tmp_path / name / "queries.jsonl").write_text("")
        (tmp_path / name / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n")
    _, tokenizer = load_decoder(directory)
    texts = quantised.read_windows(tmp_path, tokenizer, 2)
    again = quantised.read_windows(tmp_path, tokenizer, 2)
    assert all(map(torch.equal, texts, again))
    assert not any(torch.equal(one, other) for one, other in pairwise(texts))
    assert quantised.count_tokens(texts) == 3 * 2 * 511


@pytest.mark.parametrize(("settings", "tolerance"), [({}, 1e-4), ({"bits": 8}, 0.05)], ids=["at once", "by token"])
def test_grating_finds_the_perplexity_of_transformers(
    directory: Path, settings: dict[str, int], tolerance: float
) -> None:
    windows = torch.randint(4, 190, (2, 12))
    ask = quantised.load_grating(lambda: None, directory=directory, threads=1, dtype="float32", **settings)
    expected = evaluate(load_decoder(directory)[0], windows).perplexity
    assert ask(windows)["perplexity"] == pytest.approx(expected, rel=tolerance)


def test_a_cost_is_over_what_the_same_text_costs() -> None:
    row = quantised.summary([11.0, 24.0], [10.0, 20.0])
    assert row["cost"] == pytest.approx((1.1 * 1.2) ** 0.5 - 1)
    assert (row["cost_least"], row["cost_most"]) == (pytest.approx(0.1), pytest.approx(0.2))
    assert row["perplexity"] == pytest.approx(264**0.5)


def test_columns_of_fewer_bits_are_less_exact_and_are_taken_back(directory: Path) -> None:
    model, _ = load_decoder(directory)
    windows = torch.randint(4, 190, (1, 30))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    rows = perplexity.measure_columns(model, [windows], None)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert [(row["density"], row["bits"]) for row in rows] == [
        (density, bits) for density in perplexity.CACHED_DENSITIES for bits in (16, 8, 4)
    ]
    assert rows[0]["cost_of_bits"] is None
    errors = []
    for bits in (8, 4):
        with perplexity.rounded(model, bits):
            now = dict(model.named_parameters())
            errors.append(max(float((now[name] - weight).abs().max()) for name, weight in before.items()))
    assert 0 < 5 * errors[0] < errors[1]


def test_rescaled_channels_compute_the_same() -> None:
    model: Any = randomise(LlamaForCausalLM(LlamaConfig(**{**SIZES, **DECODER}))).eval()
    ids = torch.randint(4, 190, (2, 9))
    with torch.inference_mode():
        expected = model(ids).logits
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    rescale_channels(model)
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if ".layers." in name}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama.cpp is not installed: make bench-deps")
def test_llama_cpp_has_the_same_weights() -> None:
    directory = find_or_write("smollm2-135m-bf16")
    file = llama_cpp.prepare(directory)["Q8_0"]
    model, _ = load_decoder(directory)
    _, ids = generation.make_prompt(directory, 60)
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    peer = llama_cpp.LlamaCpp(file, threads=1, window=128)
    assert np.abs(peer.logits(ids) - expected).mean() < 0.1 * expected.std()
    moments = peer.generate(ids, 4)
    assert sorted(moments) == moments
    assert len(moments) == 4
