"""From names and files to a loaded model, and what is told when that fails."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from grating_core import GratingError, ModelNotFoundError, Reranker, StreamedCausalLM, UnsupportedModelError
from grating_core.cli.commands import app
from grating_core.errors import FileError
from grating_core.lab.distill import distill
from grating_core.models.pickled import remedy
from grating_core.opening.rerankers import open_reranker
from grating_core.settings import RerankSettings
from tests.core.conftest import save_model
from tests.core.parity import TOLERANCE, load, padded_scores

PAIRS = [("w1 w2", "w3 w4 w5 w6"), ("w1 w2", "w7"), ("w9", "w1 w2 w3")]


@pytest.fixture
def directory(tiny_bert: Path, tmp_path: Path) -> Path:
    """A copy of the tiny BERT that a test may damage."""
    return Path(shutil.copytree(tiny_bert, tmp_path / "model"))


def change_config(directory: Path, **fields: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_sharded_weights(tmp_path: Path) -> None:
    directory = save_model(tmp_path, "bert", max_shard_size="20KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    assert load(directory).score(PAIRS) == pytest.approx(padded_scores(directory, PAIRS), abs=TOLERANCE)


def test_bfloat16_on_disk(directory: Path) -> None:
    path = directory / "model.safetensors"
    save_file({name: weight.bfloat16() for name, weight in load_file(path).items()}, path, {"format": "pt"})
    assert load(directory).score(PAIRS) == pytest.approx(padded_scores(directory, PAIRS), abs=TOLERANCE)


def test_names_of_old_checkpoints(directory: Path) -> None:
    expected = load(directory).score(PAIRS)
    path = directory / "model.safetensors"
    weights = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): weight
        for name, weight in load_file(path).items()
    }
    assert any(name.endswith("gamma") for name in weights)
    save_file(weights | {"bert.embeddings.position_ids": torch.arange(96)[None]}, path, {"format": "pt"})
    assert load(directory).score(PAIRS) == expected


def test_the_weights_outlive_their_file(directory: Path) -> None:
    reranker = load(directory)
    expected = reranker.score(PAIRS)
    path = directory / "model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))  # in place: a mapped file would change under the model
    assert reranker.score(PAIRS) == expected


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("config.json", None, "no config.json"),
        ("config.json", b"{", "cannot be read"),
        ("model.safetensors", None, r"lacks model.safetensors\. Only safetensors"),
        ("model.safetensors", b"x", "as safetensors"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "b.safetensors"}}', "lacks b.safetensors"),
        ("model.safetensors.index.json", b"[]", "index.json cannot be read"),
        ("tokenizer.json", b"{}", "tokenizer in .* cannot be loaded"),
    ],
)
def test_damaged_models_are_told_apart(directory: Path, file: str, content: bytes | None, told: str) -> None:
    path = directory / file
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ModelNotFoundError, match=told):
        load(directory)


def test_truncated_weights_are_refused(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-99])
    with pytest.raises(ModelNotFoundError, match="as safetensors"):
        load(directory)


def test_missing_tensors_are_named(directory: Path) -> None:
    path = directory / "model.safetensors"
    weights = load_file(path)
    del weights["bert.encoder.layer.2.output.dense.weight"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(
        ModelNotFoundError, match=r"lack 1 tensors.*bert\.encoder\.layer\.2\.output\.dense\.weight"
    ):
        load(directory)


def test_weights_without_a_head_are_no_reranker(directory: Path) -> None:
    path = directory / "model.safetensors"
    weights = load_file(path)
    del weights["classifier.weight"], weights["classifier.bias"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ModelNotFoundError, match=r"lack classifier\.weight, the head.*makes embeddings"):
        load(directory)


def test_labels_that_a_configuration_leaves_out_are_named(directory: Path) -> None:
    path = directory / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(
        json.dumps({n: v for n, v in fields.items() if n not in ("id2label", "label2id", "num_labels")})
    )
    with pytest.raises(ModelNotFoundError, match=r'config\.json describes 2 labels.*write "num_labels": 1'):
        load(directory)
    change_config(directory, num_labels=1)
    assert len(load(directory).score(PAIRS)) == 3


def run_shown(message: str) -> None:
    """Run the command that a message shows."""
    exec(shlex.split(message[message.index("python -c") :])[2], {})


def test_pickles_are_never_opened(directory: Path) -> None:
    expected, weights = load(directory).score(PAIRS), load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(weights, directory / "pytorch_model.bin")
    with pytest.raises(ModelNotFoundError, match=r"never pickled weights: .* pytorch_model\.bin") as refused:
        load(directory)
    run_shown(str(refused.value))
    assert load(directory).score(PAIRS) == expected
    (directory / "model.safetensors").unlink()
    change_config(directory, architectures=["Unheard"])  # transformers does not have it
    run_shown(remedy(directory))
    change_config(directory, architectures=["BertForSequenceClassification"])
    assert load(directory).score(PAIRS) == expected


def test_code_in_a_checkpoint_is_never_run(directory: Path, tmp_path: Path) -> None:
    proof = tmp_path / "it ran"
    (directory / "evil.py").write_text(f"open({str(proof)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    change_config(
        directory, auto_map={"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"}
    )
    assert len(load(directory).score(PAIRS)) == 3
    assert not proof.exists()


def test_another_architecture_is_refused(directory: Path) -> None:
    change_config(directory, architectures=["BertForMaskedLM"])
    with pytest.raises(
        UnsupportedModelError, match=r"BertForMaskedLM.*supported are BertForSequenceClassification"
    ):
        load(directory)


@pytest.mark.parametrize(
    "name", ["", "./nowhere", "/nowhere/at all", "a/b/c", "n" * 300, "bundled:something-else", "~no-such-user/x"]
)
def test_names_that_lead_nowhere(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match=re.escape(f"model={name!r}")):
        Reranker.from_pretrained(name)


def test_an_empty_name_is_not_called_a_directory() -> None:
    with pytest.raises(ModelNotFoundError, match=r"^model='': this is not a hub id"):
        Reranker.from_pretrained("")


def test_a_file_of_weights_leads_to_its_directory(directory: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="is no directory: name the directory that holds"):
        Reranker.from_pretrained(directory / "model.safetensors")


def test_the_home_of_nobody_is_an_error_of_gratings_own_wherever_a_place_is_named(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = "~no-such-user/x"
    monkeypatch.chdir(tmp_path)
    for kind in (str, Path):
        with pytest.raises(ModelNotFoundError, match=place):
            Reranker.from_pretrained(kind(place))
        with pytest.raises(ModelNotFoundError, match=place):
            Reranker.shared(kind(place))
        with pytest.raises(ModelNotFoundError, match=place):
            StreamedCausalLM.from_pretrained(kind(place))
        with pytest.raises(FileError, match=place):
            Reranker.from_pretrained(tiny_bert, lens=kind(place))
        with pytest.raises(ModelNotFoundError, match=place):
            distill(kind(place), ["w1"], tmp_path / "output")
    with pytest.raises(ModelNotFoundError, match=place):
        Reranker.from_pretrained(tiny_bert, adapter=place)
    with pytest.raises(ModelNotFoundError, match=place):
        open_reranker(RerankSettings(model=place, memory_budget="1GB"))
    for arguments in (["rerank", "-m", place, "-q", "x", "y"], ["plan", place, "--memory-budget", "1GB"]):
        failed = CliRunner().invoke(app, arguments, input="y")
        assert failed.exit_code != 0
        assert not isinstance(failed.exception, RuntimeError), arguments
    assert not list(tmp_path.iterdir())


def run_offline(code: str, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "PATH": ""}
    environment["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")  # the same kernels, to the last bit
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )


def test_hub_ids_come_from_the_hubs_cache_when_offline(tiny_bert: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny"
    shutil.copytree(tiny_bert, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    found = run_offline(
        "from grating_core import Reranker\n"
        "r = Reranker.from_pretrained('someone/tiny', dtype='float32', device='cpu')\n"
        f"print(r.model_path, r.score({PAIRS!r}))",
        tmp_path,
    )
    assert found.returncode == 0, found.stderr
    assert str(repository / "snapshots" / commit) in found.stdout
    assert str(load(tiny_bert).score(PAIRS)) in found.stdout


def test_hub_ids_that_are_not_cached_are_named_when_offline(tmp_path: Path) -> None:
    failed = run_offline("from grating_core import Reranker; Reranker.from_pretrained('someone/else')", tmp_path)
    assert "ModelNotFoundError" in failed.stderr.splitlines()[-1]
    assert "someone/else" in failed.stderr.splitlines()[-1]


def configured(**fields: object) -> Callable[[Path], None]:
    return lambda directory: change_config(directory, **fields)


def written(file: str, text: str) -> Callable[[Path], object]:
    return lambda directory: (directory / file).write_text(text)


def without_tokenizer(directory: Path) -> None:
    for path in directory.glob("tokenizer*"):
        path.unlink()


def with_integer_weights(directory: Path) -> None:
    """As 8-bit checkpoints have them: without their scales they mean nothing."""
    path = directory / "model.safetensors"
    weights = load_file(path)
    name = "bert.encoder.layer.0.output.dense.weight"
    save_file(weights | {name: (weights[name] * 50).to(torch.int8)}, path, {"format": "pt"})


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(without_tokenizer, id="no tokenizer files"),
        pytest.param(with_integer_weights, id="int8 weights"),
        pytest.param(written("config.json", "[]"), id="config is a list"),
        pytest.param(configured(architectures=5), id="architectures is a number"),
        pytest.param(configured(hidden_size=64), id="config does not fit the weights"),
        pytest.param(configured(hidden_size="x"), id="size is a text"),
        pytest.param(configured(hidden_size=33), id="size not divisible by heads"),
        pytest.param(configured(hidden_act="nope"), id="unknown activation"),
        pytest.param(
            written("model.safetensors.index.json", '{"weight_map": {"a": 5}}'), id="index names no file"
        ),
    ],
)
def test_damaged_models_raise_an_error_of_gratings_own(directory: Path, damage: Callable[[Path], object]) -> None:
    damage(directory)
    with pytest.raises(GratingError):
        load(directory)
