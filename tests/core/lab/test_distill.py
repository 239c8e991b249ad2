"""Adapters that make up for pruning, trained on tiny random decoders."""

import json
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from grating_core import GratingError, ModelNotFoundError, UnsupportedModelError
from grating_core.cli.commands import app
from grating_core.columns.allocation import allocate
from grating_core.columns.masks import Shares
from grating_core.errors import StorageError
from grating_core.files.locks import locked
from grating_core.lab import distill as distilling
from grating_core.lab import training
from grating_core.lab.decoders import load_decoder
from grating_core.lab.distill import Distilled, distill, hold_out
from grating_core.lab.masked import MaskedMlp
from grating_core.lab.student import Divergence, LowRankMlp, Student, TrainedMlp
from grating_core.lab.training import Training
from grating_core.models.adapter import Adapter
from tests.core.conftest import DECODER, SIZES, WORDS, randomise, save_model, save_tokenizer
from tests.core.faults import largest_file
from tests.core.models.test_decoders import CAUSAL, save_decoder
from tests.core.parity import random_text

SETTINGS = {"rank": 8, "steps": 12, "tokens_per_step": 64, "window": 16, "learning_rate": 5e-3, "dtype": "float32"}
STATE = "unfinished.safetensors"
SOURCE = random.Random(3)
PACKED = {"phi3"}  # families whose gate and up matrices are one, which cannot be trained
TEXTS = [random_text(60, SOURCE, WORDS) for _ in range(60)]


class StopError(Exception):
    """Ends training from inside."""


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its embeddings have two dimensions, so what is pruned of an input can be learnt from the rest."""
    directory = tmp_path_factory.mktemp("decoder")
    torch.manual_seed(0)
    model = randomise(LlamaForCausalLM(LlamaConfig(**SIZES | {"num_hidden_layers": 2}, **DECODER)))
    with torch.no_grad():
        table = model.model.embed_tokens.weight
        table.copy_(torch.randn(len(table), 2) @ torch.randn(2, table.shape[1]))
    model.save_pretrained(directory)
    save_tokenizer(directory, types=False)
    return directory


@pytest.fixture(scope="module")
def finished(decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Distilled:
    changes = {"steps": 60, "tokens_per_step": 128, "learning_rate": 1e-2}
    return distill(decoder, TEXTS, tmp_path_factory.mktemp("output"), **SETTINGS | changes)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


@contextmanager
def stopping(step: int, error: type[BaseException] = StopError) -> Iterator[None]:
    """Let training write its state at every step, and end when it begins this one, or at last the adapter."""
    learn, begun = Student.learn, 0

    def counted(student: Student, ids: torch.Tensor) -> float:
        nonlocal begun
        begun += 1
        if begun == step:
            raise error
        return learn(student, ids)

    def stop(*_: object) -> None:
        raise error

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Student, "learn", counted)
        patched.setattr(distilling, "write_adapter", stop)
        patched.setattr(training, "SECONDS_BETWEEN_STATES", -1.0)
        yield


# What is computed


def test_the_divergence_and_its_gradient_are_those_of_torch() -> None:
    chance = torch.Generator().manual_seed(0)
    head = nn.Linear(16, 50).requires_grad_(False)
    student, teacher = (3 * torch.randn(300, 16, generator=chance) for _ in range(2))
    measured, gradient = Divergence(head, 50, torch.device("cpu"))(student, teacher)
    student.requires_grad_()
    logs = [head(states).log_softmax(-1) for states in (student, teacher)]
    expected = functional.kl_div(*logs, log_target=True, reduction="batchmean")
    assert measured == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_found_faster_are_the_same(decoder: Path, dtype: torch.dtype) -> None:
    dense = AutoModelForCausalLM.from_pretrained(decoder, dtype=dtype).model.layers[1].mlp.requires_grad_(False)
    chance = torch.Generator().manual_seed(0)
    adapted = LowRankMlp(dense, 4, chance)
    nn.init.normal_(adapted.down_proj.up)
    # No two of a row are as large in bfloat16.
    sizes = torch.stack([1.03 ** torch.randperm(32, generator=chance) for _ in range(40)]).to(dtype)
    hidden = sizes * torch.randn(40, 32, generator=chance).sign().to(dtype)
    shares = Shares(0.4, 1.0)
    expected = MaskedMlp(adapted, shares)(hidden)
    torch.testing.assert_close(TrainedMlp(adapted, shares)(hidden), expected, rtol=0, atol=0)
    if dtype == torch.float32:  # the products of bfloat16 have ties
        shares = Shares(0.4, 0.3)
        grown = [hidden.clone().requires_grad_() for _ in range(2)]
        outputs = [
            kind(adapted, shares)(states) for kind, states in zip((TrainedMlp, MaskedMlp), grown, strict=True)
        ]
        torch.testing.assert_close(*outputs)
        gradients = [torch.autograd.grad(out.sum(), states)[0] for out, states in zip(outputs, grown, strict=True)]
        torch.testing.assert_close(*gradients)


def test_training_brings_the_pruned_model_back_to_the_dense_one(finished: Distilled) -> None:
    assert finished.pruned.divergence > 0.02
    assert finished.recovered.divergence < 0.75 * finished.pruned.divergence
    assert finished.trained == 60 * 128


def test_the_figures_are_those_of_transformers(decoder: Path, finished: Distilled) -> None:
    model = AutoModelForCausalLM.from_pretrained(decoder).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(decoder)
    ids = [token for text in TEXTS for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    windows, _ = hold_out(torch.tensor(ids[: len(ids) // 16 * 16]).view(-1, 16), seed=0)
    assert finished.held_out == windows.numel()
    with torch.inference_mode():
        losses = [float(model(ids[None], labels=ids[None]).loss) for ids in windows]
    assert finished.dense == pytest.approx(torch.tensor(losses).mean().exp().item(), rel=1e-4)


def test_the_adapter_merged_is_what_was_trained(decoder: Path, finished: Distilled) -> None:
    config = json.loads((finished.directory / "adapter_config.json").read_text())
    assert {path.name for path in finished.directory.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    assert (config["peft_type"], config["task_type"], config["r"]) == ("LORA", "CAUSAL_LM", 8)
    assert sorted(config["target_modules"]) == ["down_proj", "gate_proj", "up_proj"]
    assert config["base_model_name_or_path"] == str(decoder)

    merged = AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.float32).eval().requires_grad_(False)
    adapter = Adapter(finished.directory)
    adapter.check({name: tuple(weight.shape) for name, weight in merged.state_dict().items()}, ())
    assert len(adapter.changes) == 3 * 2
    for name, change in adapter.changes.items():
        change.add_to(merged.get_parameter(name))
    for layer, shares in zip(merged.model.layers, allocate(0.5, 2), strict=True):
        layer.mlp = MaskedMlp(layer.mlp, shares)

    base = AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.float32).eval().requires_grad_(False)
    student = Student(base, 0.5, 8, seed=1)
    changes = student.changes()
    assert changes.keys() == weights(finished.directory).keys()
    with torch.no_grad():
        for name, tensor in weights(finished.directory).items():
            changes[name].copy_(tensor)
        ids = torch.arange(4, 64).view(2, 30)
        expected = student.head(student.hidden(student.exact, ids))
        logits = merged(ids).logits.flatten(0, 1)
    assert float((student.head(student.hidden(student.dense, ids)) - expected).abs().max()) > 0.1
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", sorted(CAUSAL.keys() - PACKED))
def test_the_teacher_is_transformers_model(family: str, tmp_path: Path) -> None:
    directory = save_decoder(tmp_path, family)
    loaded, _ = load_decoder(directory)
    student = Student(loaded, 0.5, 2, seed=0)
    ids = torch.arange(4, 64).view(2, 30)
    with torch.inference_mode():
        logits = student.head(student.hidden(student.dense, ids))
        reference = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        )
        expected = reference.eval()(ids).logits
    torch.testing.assert_close(logits, expected.flatten(0, 1), rtol=1e-4, atol=1e-4)


def test_a_revision_in_the_hubs_cache_is_what_is_trained(decoder: Path, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--someone--tiny"
    for commit, source, ref in (
        ("0" * 40, decoder, "old"),
        ("1" * 40, save_decoder(tmp_path / "new", "qwen3"), "main"),
    ):
        shutil.copytree(source, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
    settings, hub = SETTINGS | {"steps": 1}, {"cache_dir": tmp_path / "hub", "local_files_only": True}
    expected = distill(decoder, TEXTS, tmp_path / "expected", **settings)
    found = distill("someone/tiny", TEXTS, tmp_path / "found", revision="old", **hub, **settings)
    assert (found.dense, found.recovered) == (expected.dense, expected.recovered)
    assert distill("someone/tiny", TEXTS, tmp_path / "newest", **hub, **settings).dense != expected.dense
    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    command = f"distill someone/tiny --text {tmp_path / 'text.txt'} --output {tmp_path / 'command'} --revision old"
    command += f" --cache-dir {tmp_path / 'hub'} --local-files-only --steps 1 --dtype float32"
    done = CliRunner().invoke(app, command.split())
    assert done.exit_code == 0, done.stderr
    with pytest.raises(ModelNotFoundError, match="other"):
        distill("someone/tiny", TEXTS, tmp_path / "none", revision="other", **hub, **settings)


# Going on


@pytest.mark.parametrize("stops", [[1], [5], [3, 4], [13]])
def test_going_on_ends_where_going_through_does(decoder: Path, tmp_path: Path, stops: list[int]) -> None:
    whole = distill(decoder, TEXTS, tmp_path / "whole", **SETTINGS)
    for step in stops:
        with stopping(step), pytest.raises(StopError):
            distill(decoder, TEXTS, tmp_path / "parts", **SETTINGS)
        assert [path.name for path in (tmp_path / "parts").iterdir()] == [STATE]
    parts = distill(decoder, TEXTS, tmp_path / "parts", **SETTINGS)
    assert (parts.dense, parts.pruned, parts.recovered) == (whole.dense, whole.pruned, whole.recovered)
    expected = weights(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "parts").items():
        assert torch.equal(tensor, expected[name]), name
    assert not (tmp_path / "parts" / STATE).exists()


def test_what_a_killed_process_leaves_is_no_hindrance(decoder: Path, tmp_path: Path) -> None:
    with stopping(4, KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        distill(decoder, TEXTS, tmp_path, **SETTINGS)
    for name in (STATE, "adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / f".{name}-abcdef01").write_bytes(b"half")
        (tmp_path / f".{name}.lock").write_bytes(b"")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"written before its description")
    distill(decoder, TEXTS, tmp_path, **SETTINGS)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture(scope="module")
def unfinished(decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("unfinished")
    with stopping(3), pytest.raises(StopError):
        distill(decoder, TEXTS, directory, **SETTINGS)
    return directory


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 4}, r"another rank \(rank=8\)"),
        ({"mlp_density": 0.6}, r"another mlp_density, shares \(mlp_density=0.5\)"),
        ({"learning_rate": 1e-3, "seed": 1}, r"another learning_rate, seed \(learning_rate=0.005, seed=0\)"),
        ({"texts": TEXTS[1:]}, "another text:"),
        ({"model": "other"}, "another model"),
    ],
)
def test_a_state_of_other_settings_is_refused(
    decoder: Path, unfinished: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    before = (unfinished / STATE).read_bytes()
    if "model" in changes:
        changes = {"model": save_decoder(tmp_path, "llama")}
    asked = {"model": decoder, "texts": TEXTS} | SETTINGS | changes
    with pytest.raises(ValueError, match=message):
        distill(output=unfinished, **asked)
    assert (unfinished / STATE).read_bytes() == before


def test_a_damaged_state_is_refused(decoder: Path, unfinished: Path, tmp_path: Path) -> None:
    (tmp_path / STATE).write_bytes((unfinished / STATE).read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"unfinished\.safetensors cannot be read.*delete it"):
        distill(decoder, TEXTS, tmp_path, **SETTINGS)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("settings", "[" * 100_000), ("settings", "{"), ("settings", "5"), ("settings", "[1]"),
        ("before", "[" * 100_000), ("before", ""), ("before", "[]"), ("before", '{"dense": 1, "other": 2}'),
        ("step", "[]"),
    ],
)  # fmt: skip
def test_a_state_whose_description_is_damaged_is_refused(
    decoder: Path, unfinished: Path, tmp_path: Path, name: str, text: str
) -> None:
    with safe_open(unfinished / STATE, "pt") as file:
        description = file.metadata() | {name: text}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    save_file(tensors, tmp_path / STATE, description)
    with pytest.raises(ValueError, match=r"unfinished\.safetensors cannot be read.*delete it"):
        distill(decoder, TEXTS, tmp_path, **SETTINGS)


def test_the_command_goes_on_where_it_was_stopped(decoder: Path, tmp_path: Path) -> None:
    files = [tmp_path / "some.jsonl", tmp_path / "more.txt"]
    files[0].write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:30]))
    files[1].write_text("\n".join(TEXTS[30:]))
    command = ["distill", str(decoder), "--output", str(tmp_path / "output")]
    command += [part for file in files for part in ("--text", str(file))]
    command += [part for name, value in SETTINGS.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    with stopping(4, KeyboardInterrupt):
        stopped = CliRunner().invoke(app, command)
    assert (stopped.exit_code, stopped.stdout) == (130, "")
    assert "The same command goes on" in stopped.stderr
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.stderr
    assert "pruned, with the adapter" in done.stdout
    assert "Trained on 768 tokens" in done.stdout
    assert Adapter(tmp_path / "output").changes
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 2
    assert "already holds" in again.stderr


# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_density": 0.0}, "mlp_density=0.0"),
        ({"mlp_density": 1.1}, "mlp_density=1.1"),
        ({"rank": 0}, "rank=0"),
        ({"steps": 0}, "steps=0"),
        ({"tokens_per_step": 0}, "tokens_per_step=0"),
        ({"window": 1}, "window=1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"dtype": "float16"}, "dtype='float16'"),
        ({"device": "abacus"}, "device='abacus'"),
    ],
)
def test_arguments_that_make_no_sense(decoder: Path, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distill(decoder, TEXTS, tmp_path / "output", **SETTINGS | changes)
    assert not (tmp_path / "output").exists()


def test_a_text_that_is_too_short(decoder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"have 60 tokens, and at least 80 are needed"):
        distill(decoder, TEXTS[:1], tmp_path / "output", **SETTINGS)
    assert not (tmp_path / "output").exists()


def test_models_that_are_none(decoder: Path, tiny_bert: Path, tmp_path: Path) -> None:
    classifier = save_model(tmp_path / "classifier", "llama")
    for model, name in ((tiny_bert, "BertFor"), (classifier, "LlamaFor")):
        with pytest.raises(UnsupportedModelError, match=rf"{name}SequenceClassification, which does not generate"):
            distill(model, TEXTS, tmp_path / "output", **SETTINGS)
    for family in PACKED:
        with pytest.raises(UnsupportedModelError, match=r"has one matrix, gate_up_proj"):
            distill(save_decoder(tmp_path / family, family), TEXTS, tmp_path / "output", **SETTINGS)
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        distill(tmp_path / "nowhere", TEXTS, tmp_path / "output", **SETTINGS)


def test_a_model_that_lacks_weights(decoder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(decoder)
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    model.save_pretrained(tmp_path / "model", state_dict=state)
    save_decoder(tmp_path / "other", "qwen3")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(ModelNotFoundError, match=r"lack 1 tensors.*model\.layers\.1\.mlp\.up_proj\.weight"):
        distill(tmp_path / "model", TEXTS, tmp_path / "output", **SETTINGS)


def test_an_output_that_holds_something_else(decoder: Path, finished: Distilled, tmp_path: Path) -> None:
    (tmp_path / "diary.txt").write_text("dear diary")
    for output, message in ((tmp_path, r"diary\.txt"), (tmp_path / "diary.txt", "is a file"),
                            (finished.directory, r"adapter_config\.json")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            distill(decoder, TEXTS, output, **SETTINGS)
    assert (tmp_path / "diary.txt").read_text() == "dear diary"


@pytest.mark.parametrize("write", [1, 4])
def test_no_space_left(decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int) -> None:
    write_state, done = Training.save, 0

    def filling_up(unfinished: Training) -> None:
        nonlocal done
        done += 1
        with largest_file(10_000) if done >= write else nullcontext():
            write_state(unfinished)

    with monkeypatch.context() as patched:
        patched.setattr(Training, "save", filling_up)
        patched.setattr(training, "SECONDS_BETWEEN_STATES", -1.0)
        with pytest.raises(StorageError, match=r"output=.*File too large; it takes \d.* MB"):
            distill(decoder, TEXTS, tmp_path / "output", **SETTINGS)
    assert (tmp_path / "output").exists() == (write > 1)
    if write > 1:
        assert [path.name for path in (tmp_path / "output").iterdir()] == [STATE]
    found = distill(decoder, TEXTS, tmp_path / "output", **SETTINGS)
    assert found.recovered.divergence < found.pruned.divergence


def test_no_space_is_known_before_anything_is_computed(
    decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Student, "measure", lambda *_: pytest.fail("it has been computed"))
    with (
        largest_file(10_000),
        pytest.raises(StorageError, match=r"output=.*takes 0\.\d MB, and .* MB are free in"),
    ):
        distill(decoder, TEXTS, tmp_path / "output", **SETTINGS)
    assert not (tmp_path / "output").exists()


def test_an_output_that_another_process_writes(decoder: Path, unfinished: Path) -> None:
    with locked(unfinished / STATE), pytest.raises(ValueError, match="is being written by another process"):
        distill(decoder, TEXTS, unfinished, **SETTINGS)
    assert [path.name for path in unfinished.iterdir()] == [STATE]


def test_who_may_read_what_is_written(unfinished: Path, finished: Distilled) -> None:
    assert (unfinished / STATE).stat().st_mode & 0o777 == 0o600  # it is derived from the text
    for path in finished.directory.iterdir():  # which an adapter is as well, but that is there to be shared
        assert path.stat().st_mode & 0o777 == 0o644


def test_training_that_diverges_says_so(decoder: Path, tmp_path: Path) -> None:
    with pytest.raises(GratingError, match="lower learning_rate"):
        distill(decoder, TEXTS, tmp_path / "output", **SETTINGS | {"learning_rate": 1e30})
