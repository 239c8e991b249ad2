"""What each command does, in this process: one of its own takes seconds to import what it needs."""

import json
import random
from pathlib import Path

import pytest

from grating_core import BudgetError, Reranker, StreamedCausalLM
from tests.core.cli.conftest import DOCUMENTS, QUERY, grating
from tests.core.conftest import BUNDLED, WORDS
from tests.core.engine.test_padded import saved
from tests.core.models.test_decoders import save_decoder
from tests.core.models.test_hub import FIRST, NAME, cached
from tests.core.parity import random_text
from tests.core.text.test_prompts import save_qwen3_reranker


def test_help_names_every_command() -> None:
    shown = grating("--help")
    assert shown.exit_code == 0
    commands = (
        "rerank",
        "explain",
        "select",
        "serve",
        "mcp",
        "generate",
        "calibrate",
        "distill",
        "simulate",
        "plan",
        "models",
        "doctor",
    )
    assert all(command in shown.stdout for command in commands)


@pytest.mark.parametrize(
    ("name", "content", "options"),
    [
        ("d.jsonl", "\n".join(json.dumps({"body": text}) for text in DOCUMENTS), ["--field", "body"]),
        ("d.csv", "id,text\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(DOCUMENTS)), []),
    ],
    ids=["jsonl", "csv"],
)
def test_rerank_reads_files(tmp_path: Path, name: str, content: str, options: list[str]) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    done = grating("rerank", "--query", QUERY, "--input", str(path), "--top-k", "2", "--json", *options)
    assert done.exit_code == 0, done.stderr
    ranking = json.loads(done.stdout)["ranking"]
    assert [entry["index"] for entry in ranking] == [1, 2]
    assert ranking[0]["text"] == DOCUMENTS[1]
    assert ranking[0]["score"] > 5 > ranking[1]["score"]


def test_rerank_prints_a_table_from_standard_input() -> None:
    done = grating("rerank", "-q", QUERY, "-i", "-", "-k", "1", stdin="\n\n".join(DOCUMENTS))
    assert done.exit_code == 0, done.stderr
    assert "3,520,031" in done.stdout
    assert "Metropolitan" not in done.stdout
    assert "compute share" in done.stdout


def test_select_prints_passages_of_a_text(tmp_path: Path) -> None:
    bread = "Bread rises because yeast turns sugar into carbon dioxide.\n"
    path = tmp_path / "book.txt"
    path.write_text("\n".join([*[bread] * 9, DOCUMENTS[1] + "\n", *[bread] * 9]), encoding="utf-8")
    asked = ("select", "-q", QUERY, "-i", str(path), "-n", "20", "--chunk-tokens", "20")
    done = grating(*asked)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == DOCUMENTS[1] + "\n"
    (passage,) = json.loads(grating(*asked, "--json").stdout)["passages"]
    assert path.read_text(encoding="utf-8")[passage["start"] : passage["end"]] == passage["text"] == DOCUMENTS[1]
    assert (passage["document"], passage["tokens"]) == (0, 16)


def test_select_takes_documents_and_tells_of_bad_input() -> None:
    documents = "\n".join(json.dumps({"text": text}) for text in DOCUMENTS)
    done = grating("select", "-q", QUERY, "-i", "-", "-n", "20", "--json", stdin=documents)
    assert [passage["document"] for passage in json.loads(done.stdout)["passages"]] == [1]
    done = grating("select", "-q", QUERY, "-i", "-", "-n", "0", stdin="text")
    assert done.exit_code == 2
    assert "--max-tokens" in done.stderr


def test_explain_shows_every_layer_and_draws_a_picture(tmp_path: Path) -> None:
    picture = tmp_path / "out.png"
    done = grating(
        "explain", "-q", QUERY, "-i", "-", "-k", "1", "--json", "--plot", str(picture), "--pruning", "cluster",
        stdin="\n".join(DOCUMENTS),
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    layers = json.loads(done.stdout)["layers"]
    assert [layer["layer"] for layer in layers] == list(range(1, 13))
    assert set(layers[0]["routes"]) <= {"selected", "dropped", "deferred"}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_explain_prints_the_trace_as_a_table() -> None:
    done = grating("explain", "-q", QUERY, "-i", "-", stdin="\n".join(DOCUMENTS))
    assert done.exit_code == 0, done.stderr
    rows = [line.split() for line in done.stdout.partition("By layer")[2].splitlines()]
    assert [row[0] for row in rows if len(row) == 10 and row[1].isdigit()] == [str(n) for n in range(1, 13)]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--query", "q", "--input", "-", "--top-k", "0"], "--top-k"),
        (["--query", "q", "--input", "/no/such/file"], "/no/such/file"),
        (["--query", "q", "--input", "-", "--input-format", "jsonl"], "line 1"),
        (["--query", "q", "--input", "-", "--model", "./nowhere"], "nowhere"),
        (["--query", "q", "--input", "-", "--scores", "rough"], "'rough'"),
        (["--query", "q", "--input", "-", "--template", "qwen4"], "template='qwen4'"),
        (["--query", "q", "--input", "-", "--long-documents", "split"], "--long-documents"),
        (["--query", "q", "--input", "-", "--instruction", "be strict"], "instruction='be strict'"),
    ],
)
def test_bad_input_is_told_in_a_sentence(arguments: list[str], told: str) -> None:
    done = grating("rerank", *arguments, stdin="a document\nanother")
    assert done.exit_code == 2
    assert told in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_decoder_is_asked_with_the_users_instruction(tmp_path: Path) -> None:
    model = save_qwen3_reranker(tmp_path)
    settings = {"instruction": "Find cities", "long_documents": "windows", "max_length": 300, "dtype": "float32"}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    documents = [*DOCUMENTS, "Bread. " * 100]
    done = grating(
        "rerank", "-q", QUERY, "-i", "-", "-m", str(model), "--json", *options, stdin="\n".join(documents)
    )
    assert done.exit_code == 0, done.stderr
    with Reranker.from_pretrained(model, **settings, device="cpu") as reranker:
        expected = reranker.score([(QUERY, text) for text in documents])
    scores = {entry["index"]: entry["score"] for entry in json.loads(done.stdout)["ranking"]}
    assert scores == pytest.approx(dict(enumerate(expected)), abs=1e-4)


def test_no_documents_give_an_empty_ranking() -> None:
    done = grating("rerank", "-q", QUERY, "-i", "-", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["ranking"] == []


def test_models_and_doctor() -> None:
    listed, checked = grating("models"), grating("doctor")
    assert "bundled:ms-marco-minilm-l12" in listed.stdout
    assert "ModernBertForSequenceClassification" in listed.stdout
    assert all(what in checked.stdout for what in ("torch", "device", "dtype", "cache"))


def test_models_says_what_would_happen_to_a_model(tmp_path: Path) -> None:
    done = grating("models", BUNDLED, "--device", "cpu", "--dtype", "float32", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["architecture"], found["engine"], found["layers"]) == (
        "BertForSequenceClassification",
        "grating",
        12,
    )
    assert (found["format"], found["lens"], found["dtype"], found["window"]) == (
        "pair",
        "packaged",
        "float32",
        512,
    )
    assert found["bytes"] == sum(path.stat().st_size for path in Path(found["path"]).glob("*.safetensors"))
    with pytest.raises(BudgetError) as refused:
        Reranker.from_pretrained(BUNDLED, device="cpu", dtype="float32", memory_budget=1)
    assert found["smallest_budget"] == refused.value.smallest > found["smallest_budget_int8"] > 0
    shown = grating("models", BUNDLED)
    assert "comes with grating" in shown.stdout
    prompted = save_qwen3_reranker(tmp_path / "Qwen3-Reranker-0.6B")
    assert "the prompt qwen3-reranker" in grating("models", str(prompted)).stdout


def test_models_says_who_computes_what_only_transformers_knows(tmp_path: Path) -> None:
    directory = saved(tmp_path / "albert", "albert")
    found = json.loads(grating("models", str(directory), "--json").stdout)
    assert (found["engine"], found["architecture"]) == ("transformers", "AlbertForSequenceClassification")
    assert (found["dtype"], found["lens"], found["smallest_budget"]) == ("float32", None, None)
    assert "slower" in grating("models", str(directory)).stdout
    refused = grating("models", str(directory), "--engine", "grating")
    assert refused.exit_code == 2
    assert "AlbertForSequenceClassification" in refused.stderr
    cached(tmp_path / "hub", FIRST, directory, "v1")
    kept = ("models", NAME, "--cache-dir", str(tmp_path / "hub"), "--local-files-only", "--json")
    assert json.loads(grating(*kept, "--revision", "v1").stdout)["path"].endswith(FIRST)
    assert "v2" in grating(*kept, "--revision", "v2").stderr
    unknown = grating("models", "monot5/base", "--local-files-only", "--json")
    assert unknown.exit_code == 2
    assert "monot5/base" in unknown.stderr
    assert unknown.stdout == ""


def test_demo_answers_a_question_of_the_users() -> None:
    done = grating("demo", "--query", "What does the finally clause of try do?", "-k", "2", "--candidates", "10")
    assert done.exit_code == 0, done.stderr
    assert "finally" in done.stdout
    assert "unpruned" in done.stdout
    assert "compute share" in done.stdout


def test_plan_prints_what_a_budget_is_spent_on() -> None:
    shown = grating(
        "plan",
        "bundled:ms-marco-minilm-l12",
        "--memory-budget",
        "110MB",
        "--candidates",
        "600",
        "--dtype",
        "float32",
    )
    assert shown.exit_code == 0, shown.stderr
    assert "resident layers" in shown.stdout
    assert "of a budget of 110.0" in shown.stdout
    assert "reads 85 MB of weights" in shown.stdout
    assert "MB of hidden states" in shown.stdout
    refused = grating("plan", "bundled:ms-marco-minilm-l12", "--memory-budget", "2MB")
    assert refused.exit_code == 2
    assert "too small" in refused.stderr


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (["--generate"], {}),
        (["--bits", "8"], {"bits": 8}),
        (["--kv-bits", "8"], {"kv_bits": 8}),
        (["--bits", "4", "--mlp-density", "0.5", "--kv-bits", "8"], {"bits": 4, "mlp_density": 0.5, "kv_bits": 8}),
    ],
)
def test_plan_of_a_model_that_generates_is_the_one_it_is_loaded_with(
    tmp_path: Path, options: list[str], settings: dict[str, float]
) -> None:
    model = save_decoder(tmp_path / "model", "llama")
    common = {"dtype": "bfloat16", "device": "cpu", "max_length": 64}
    with pytest.raises(BudgetError) as refused:
        StreamedCausalLM.from_pretrained(model, memory_budget=1, **common, **settings)
    common["memory_budget"] = refused.value.smallest + 1000
    options = ["plan", str(model), *options]
    options += [f"--{name.replace('_', '-')}={value}" for name, value in common.items()]
    done = grating(*options, "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    with StreamedCausalLM.from_pretrained(model, **common, **settings) as loaded:
        plan = loaded.plan
        generation = loaded.generate("w1 w2 w3", max_new_tokens=6)
    assert found["parts"] == plan.parts
    assert (found["total"], found["window"], found["resident_layers"]) == (plan.total, 64, len(plan.resident))
    after, pruned = generation.bytes_read - generation.bytes_to_first, "mlp_density" in settings
    assert found["token"]["bytes_read"] == plan.bytes_read()
    assert pruned or after == 5 * plan.bytes_read()
    assert "bits" in settings or plan.bytes_read() > 0  # writing a companion file takes more than all layers
    assert found["token"]["bytes_of_columns"] == (plan.sizes.columns // 2 if pruned else 0)
    assert found["column_share"] == (plan.column_share if pruned else None)
    shown = grating(*options)
    assert "keys and values" in shown.stdout
    assert ("MB of columns that it uses" in " ".join(shown.stdout.split())) == pruned
    assert ("to write companion files" in shown.stdout) == (pruned or "bits" in settings)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--bits", "5"], "bits=5 must be 8 or 4"),
        (["--kv-bits", "4"], "kv_bits=4 must be 8"),
        (["--mlp-density", "0"], "mlp_density=0.0 must be a number above 0"),
        (["--bits", "4", "--dtype", "int8"], "dtype='int8' is for rerankers"),
        (["--generate", "--template", "zerank"], "template='zerank' is for rerankers"),
        (["--kv-bits", "8", "--cutoff-layers", "9"], "cutoff_layers=9 is for rerankers"),
    ],
)
def test_plan_refuses_what_loading_refuses_before_it_looks_for_the_model(options: list[str], told: str) -> None:
    done = grating("plan", "/no/such/model", "--memory-budget", "1GB", *options)
    assert done.exit_code == 2
    assert told in " ".join(done.stderr.split())
    assert "/no/such" not in done.stderr


def test_rerank_within_a_budget_tells_of_the_disk() -> None:
    done = grating(
        "rerank",
        "-q",
        QUERY,
        "-i",
        "-",
        "--memory-budget",
        "110MB",
        "--dtype",
        "float32",
        stdin="\n".join(DOCUMENTS),
    )
    assert done.exit_code == 0, done.stderr
    assert "read 8" in " ".join(done.stdout.split())


def test_generate_writes_the_text_and_how_fast_it_came(tmp_path: Path) -> None:
    model = save_decoder(tmp_path / "model", "llama")
    options = ["-n", "12", "--temperature", "0.8", "--seed", "3", "--dtype", "float32", "--device", "cpu"]
    done = grating("generate", str(model), "--raw", "--prompt", "-", "--stop", "never", *options, stdin="w1 w2 w3")
    assert done.exit_code == 0, done.stderr
    with StreamedCausalLM.from_pretrained(model, dtype="float32", device="cpu") as loaded:
        expected = loaded.generate("w1 w2 w3", max_new_tokens=12, temperature=0.8, seed=3)
    assert done.stdout == f"{expected.text}\n"
    told = " ".join(done.stderr.split())
    assert f"{expected.new_tokens} tokens; the first after" in told
    assert "a second" in told
    refused = grating("generate", str(model), "--prompt", "w1")
    assert refused.exit_code == 2
    assert "no chat template; give a string (--raw)" in " ".join(refused.stderr.split())


def test_calibrate_writes_a_lens_that_rerank_takes(tiny_bert: Path, tmp_path: Path) -> None:
    source = random.Random(5)
    texts = [random_text(source.randint(4, 30), source, WORDS) for _ in range(80)]
    corpus, queries = tmp_path / "corpus.txt", tmp_path / "queries.txt"
    corpus.write_text("\n".join(texts[:50]), encoding="utf-8")
    queries.write_text("\n".join(texts[50:]), encoding="utf-8")
    lens = tmp_path / "lens"
    done = grating(
        "calibrate", str(tiny_bert), "--corpus", str(corpus), "--queries", str(queries), "--output", str(lens),
        "--candidates", "8", "--top-k", "2", "--requests", "30", "--target", "0.8",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    told = "Fitted on 30 requests. With 8 candidates that a lens has not seen, top 2, target 0.80"
    assert told in " ".join(done.stdout.split())
    assert "Calibrating" in done.stderr
    assert sorted(path.name for path in lens.iterdir()) == ["lens.json", "lens.safetensors"]
    few = tmp_path / "few.txt"
    few.write_text("\n".join(texts[:8]), encoding="utf-8")
    options = ["-m", str(tiny_bert), "-i", str(few), "-k", "2", "--lens", str(lens), "--target", "0.8"]
    explained = grating("explain", "-q", texts[-1], *options, "--json")
    assert explained.exit_code == 0, explained.stderr
    assert json.loads(explained.stdout)["layers"][0]["layer"] == 0

    refused = grating("rerank", "-q", "w1", "-i", str(corpus), "--lens", str(lens))
    assert refused.exit_code == 2
    assert "other weights" in " ".join(refused.stderr.split())
    missing = grating("calibrate", str(tiny_bert), "--corpus", str(tmp_path / "absent.txt"))
    assert missing.exit_code == 2
    assert "absent.txt" in missing.stderr
