"""Code that comes with a model is never run, and nobody is asked whether it may be."""

import ast
import io
import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.shapes import smollm2_file
from grating_core import GratingError, Reranker, StreamedCausalLM
from grating_core.cli.commands import app
from grating_core.lab.activations import record_activations
from grating_core.lab.decoders import empty_decoder, load_decoder
from grating_core.lab.distill import distill
from grating_core.lab.peers import LOADERS, OPENVINO, SENTENCE_TRANSFORMERS, Job
from grating_core.settings import RerankSettings
from grating_core.text.backend import load_backend
from tests.core.conftest import WORDS
from tests.core.models.test_decoders import save_decoder
from tests.core.parity import random_text

TEXT = random_text(400, random.Random(3), WORDS)
ROOT = Path(__file__).parents[3]
CLASSES = ("Config", "Model", "ModelForCausalLM", "ModelForSequenceClassification", "Tokenizer")
CODE = "open({proof!r}, 'w')\nclass Config: model_type = 'bert'\nModel = ModelForCausalLM = Tokenizer = Config\n"
QUICK = "--steps 1 --window 16 --tokens-per-step 32 --dtype float32"


def add_code(directory: Path, proof: Path, **fields: object) -> Path:
    """Name a module that leaves a file behind when it is imported."""
    named = {f"Auto{name}": f"evil.{name}" for name in CLASSES} | {"AutoTokenizer": ["evil.Tokenizer"] * 2}
    (directory / "evil.py").write_text(CODE.format(proof=str(proof)))
    for file in ("config.json", "tokenizer_config.json"):
        path = directory / file
        found = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(found | {"auto_map": named} | (fields if file == "config.json" else {})))
    return directory


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("decoder"), "llama")


@pytest.fixture
def proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What code would leave; at the end there is nothing, and no answer was read from standard input."""
    answers = io.StringIO("y\n" * 99)
    monkeypatch.setattr(sys, "stdin", answers)
    monkeypatch.setenv("GRATING_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "it ran"
    assert not (tmp_path / "it ran").exists()
    assert answers.tell() == 0


def job(directory: Path) -> Job:
    settings = RerankSettings(model=directory, device="cpu")
    return Job(settings, str(directory), [("w1", ["w2"])], top_k=1, rounds=1, threads=1, max_length=32)


BERT: dict[str, Callable[[Path, Path], Any]] = {
    "rerank": lambda model, place: Reranker.from_pretrained(model, pruning="off").score([("w1", "w2")]),
    "tokenizer": lambda model, place: load_backend(model),
    "tokenizer without tokenizer.json": lambda model, place: load_backend(without_tokenizer(model)),
    "openvino": lambda model, place: LOADERS[OPENVINO](job(model)),
    "sentence-transformers": lambda model, place: LOADERS[SENTENCE_TRANSFORMERS](job(model)),
}
DECODER: dict[str, Callable[[Path, Path], Any]] = {
    "generate": lambda model, place: StreamedCausalLM.from_pretrained(model).generate("w1", max_new_tokens=2),
    "distill": lambda model, place: distill(
        model, [TEXT] * 9, place, steps=1, tokens_per_step=32, window=16, dtype="float32"
    ),
    "record": lambda model, place: record_activations(model, TEXT, 16, path=place),
    "load_decoder": lambda model, place: load_decoder(model),
    "empty_decoder": lambda model, place: empty_decoder(model),
    "grating distill": lambda model, place: command("distill", model, place, "--output", place, *QUICK.split()),
    "grating simulate": lambda model, place: command(
        "simulate", model, place, "--memory-budget", "1GB", "--tokens", "16"
    ),
}


def without_tokenizer(model: Path) -> Path:
    (model / "tokenizer.json").unlink()
    (model / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    path = model / "tokenizer_config.json"
    named = json.loads(path.read_text())["auto_map"]
    path.write_text(json.dumps({"tokenizer_class": "BertTokenizer", "auto_map": named}))
    return model


def command(name: str, model: Path, place: Path, *options: object) -> None:
    text = place.with_suffix(".txt")
    text.write_text(TEXT)
    given = [name, str(model), "--text", str(text), *map(str, options)]
    if (done := CliRunner().invoke(app, given, input="y\n" * 9)).exit_code:
        raise GratingError(done.stderr)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("what", BERT | DECODER)
def test_code_of_a_model_is_never_run(
    tiny_bert: Path, decoder: Path, tmp_path: Path, proof: Path, what: str, known: bool
) -> None:
    if what in ("openvino", "sentence-transformers"):
        pytest.importorskip(what.replace("-", "_"))
    source = tiny_bert if what in BERT else decoder
    model = add_code(
        Path(shutil.copytree(source, tmp_path / "model")), proof, **({} if known else {"model_type": "evil"})
    )
    # Of an architecture that nobody knows it is not loaded; what matters is what is done on the way.
    with nullcontext() if known else suppress(GratingError, ValueError, OSError, KeyError):
        (BERT | DECODER)[what](model, tmp_path / "place")


@pytest.mark.slow
def test_code_beside_a_gguf_file_is_never_run(tmp_path: Path, proof: Path) -> None:
    try:
        source = smollm2_file()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    (tmp_path / "model").mkdir()
    add_code(tmp_path / "model", proof, model_type="evil")
    file = tmp_path / "model" / "tiny.gguf"
    file.symlink_to(source)
    with suppress(GratingError):
        Reranker.from_pretrained(file)


def test_no_class_is_chosen_without_saying_that_code_is_not_trusted() -> None:
    """transformers asks on standard input wherever nothing is said."""
    for folder in ("grating_core", "integrations", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
                    continue
                chosen = ast.unparse(call.func)
                if not chosen.endswith(".from_pretrained") or (
                    "Auto" not in chosen and "architecture" not in chosen
                ):
                    continue
                said = [ast.unparse(word) for word in call.keywords]
                assert "trust_remote_code=False" in said, f"{path}, line {call.lineno}"
