"""Adapters as PEFT saves them: merged as PEFT merges them, refused when damaged, and told from one another."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from grating_core import GratingError, ModelNotFoundError, Prompt, StreamedCausalLM, UnsupportedModelError
from grating_core.lens.store import lens_directory
from grating_core.models.adapter import Adapter
from grating_core.models.identity import fingerprint
from tests.core.conftest import WORDS, save_model, save_tokenizer
from tests.core.lens.test_store import calibrated
from tests.core.models.test_decoders import (
    DOCUMENTS,
    PROMPT,
    QUERY,
    merged,
    reference,
    save_adapter,
    save_decoder,
    spelled_out,
)
from tests.core.parity import TOLERANCE, load

Tensors = dict[str, torch.Tensor]
Damage = Callable[[dict[str, Any], Tensors], object]
BEFORE = "base_model.model."
TABLE = f"{BEFORE}model.embed_tokens"
UP = f"{BEFORE}model.layers.2.mlp.up_proj.lora_B.weight"
DOWN = f"{BEFORE}model.layers.2.mlp.up_proj.lora_A.weight"
PAIRS = [(QUERY, text) for text in DOCUMENTS]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("tied"), "llama-tied")


def rewrite(adapter: Path, damage: Damage) -> None:
    path, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    settings, tensors = json.loads(config.read_text()), load_file(path)
    damage(settings, tensors)
    config.write_text(json.dumps(settings))
    path.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def expected_scores(directory: Path, model: torch.nn.Module) -> list[float]:
    return reference(directory, [spelled_out(directory, QUERY, text) for text in DOCUMENTS], model=model)


# Damage


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return lambda settings, tensors: tensors.update({name: change(tensors[name])})


def say(**fields: object) -> Damage:
    return lambda settings, tensors: settings.update(fields)


def with_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(value))


def only(*ends: str) -> Damage:
    def leave(settings: dict[str, Any], tensors: Tensors) -> None:
        for name in [name for name in tensors if not name.endswith(ends)]:
            del tensors[name]

    return leave


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DAMAGE: dict[str, Damage] = {
    "no tensors": only(),
    "no lora_A": only("lora_B.weight"),
    "no lora_B": only("lora_A.weight"),
    "one lora_A is missing": lambda s, t: t.pop(DOWN),
    "one lora_B is missing": lambda s, t: t.pop(UP),
    "one layer is missing": lambda s, t: (say(target_modules=TARGETS)(s, t), t.pop(UP), t.pop(DOWN)),
    "targets that are not there": say(target_modules=r"model\\.layers\\..*|lm_head"),
    "another adapter's name": lambda s, t: t.update({UP.replace(".weight", ".default.weight"): t.pop(UP)}),
    "a tensor twice": lambda s, t: t.update({UP.removeprefix(BEFORE): t[UP].clone()}),
    **{
        f"{name[-13:-7]} is {kind}": put(name, lambda tensor, kind=kind: tensor.to(kind))
        for name in (UP, DOWN) for kind in (torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn)
    },
    **{
        f"{name[-13:-7]} has {value}": put(name, with_value(value))
        for name in (UP, DOWN) for value in (math.nan, math.inf, -math.inf)
    },
    "lora_B is vast": put(UP, lambda tensor: tensor * 1e30),
    "lora_A is vast": put(DOWN, lambda tensor: tensor * 1e9),
    "ranks differ": put(UP, lambda tensor: tensor[:, :3]),
    "ranks differ the other way": put(DOWN, lambda tensor: tensor[:3]),
    "both of another rank": lambda s, t: (put(UP, lambda x: x[:, :3])(s, t), put(DOWN, lambda x: x[:3])(s, t)),
    "lora_B is transposed": put(UP, lambda tensor: tensor.T),
    "lora_A is transposed": put(DOWN, lambda tensor: tensor.T),
    "lora_A is a vector": put(DOWN, lambda tensor: tensor[0]),
    "lora_A has another axis": put(DOWN, lambda tensor: tensor[None]),
    "lora_A is empty": put(DOWN, lambda tensor: tensor[:0]),
    "lora_B is empty": put(UP, lambda tensor: tensor[:0]),
    "lora_A is for another width": put(DOWN, lambda tensor: tensor[:, :-1]),
    "lora_B is for another width": put(UP, lambda tensor: tensor[:-1]),
    "lora_B is a number": put(UP, lambda tensor: tensor[0, 0]),
    "another r": say(r=5),
    **{f"r={r!r}": say(r=r) for r in (0, -4, "4", 4.0, math.nan, True, [4])},
    **{
        f"lora_alpha={alpha!r}": say(lora_alpha=alpha)
        for alpha in (math.nan, math.inf, -math.inf, "6", 0, True, [6], {}, 1e300)
    },
    **{f"use_rslora={rooted!r}": say(use_rslora=rooted) for rooted in ("yes", 1, 0, [])},
    "a rank for a module that has another": say(rank_pattern={"up_proj": 8}),
    **{f"rank_pattern={found!r}": say(rank_pattern=found) for found in ([4], "up", {"up_proj": "4"}, {"(": 4})},
    **{f"target_modules={found!r}": say(target_modules=found) for found in ("(", 7, {"a": 1}, [1])},
    "head promised": say(modules_to_save=["lm_head"]),
    **{f"modules_to_save={found!r}": say(modules_to_save=found) for found in ("lm_head", 7, [1])},
    "a table": lambda s, t: t.update({f"{TABLE}.weight": torch.zeros(210, 32)}),
    "a change of the table": lambda s, t: t.update(
        {f"{TABLE}.lora_A.weight": torch.ones(4, 32), f"{TABLE}.lora_B.weight": torch.ones(210, 4)}
    ),
    "an embedding's change": lambda s, t: t.update({f"{TABLE}.lora_embedding_A": torch.ones(4, 210)}),
    "a bias": lambda s, t: t.update({f"{BEFORE}model.layers.0.mlp.up_proj.bias": torch.zeros(48)}),
    "a norm": lambda s, t: t.update({f"{BEFORE}model.layers.0.input_layernorm.weight": torch.ones(32)}),
    "a magnitude": lambda s, t: t.update({DOWN.replace("lora_A", "lora_magnitude_vector"): torch.ones(48)}),
    "new tokens": lambda s, t: t.update({f"{TABLE}.token_adapter.trainable_tokens_delta": torch.ones(2, 32)}),
    "a head of another size": lambda s, t: t.update({f"{BEFORE}lm_head.weight": torch.ones(211, 32)}),
    **{
        f"{name}={value!r}": say(**{name: value})
        for name, value in {
            "peft_type": "LOHA", "use_dora": True, "fan_in_fan_out": True, "lora_bias": True, "use_qalora": True,
            "alora_invocation_tokens": [1, 2], "layer_replication": [[0, 2]], "trainable_token_indices": [1],
            "target_parameters": ["up"], "init_lora_weights": "pissa_niter_4", "alpha_pattern": {"up_proj": 2},
        }.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_adapter_is_refused_by_its_file(damage: str, llama: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", llama)
    rewrite(adapter, DAMAGE[damage])
    with pytest.raises((ModelNotFoundError, UnsupportedModelError), match=str(adapter)):
        load(llama, template=PROMPT, adapter=adapter)


def test_the_tensor_that_is_wrong_is_named(llama: Path, tmp_path: Path) -> None:
    names = {
        "one lora_A is missing": r"layers\.2\.mlp\.up_proj\.lora_B\.weight, and no lora_A",
        "one lora_B is missing": r"layers\.2\.mlp\.up_proj\.lora_A\.weight, and no lora_B",
        "lora_A has nan": r"layers\.2\.mlp\.up_proj\.lora_A\.weight has numbers that are not finite",
        "ranks differ": r"layers\.2\.mlp\.up_proj.*\[4, 32\].*\[48, 3\].*rank is 4",
        "lora_B is vast": r"layers\.2\.mlp\.up_proj\.weight by as much as",
        "one layer is missing": r"target_modules: model\.layers\.2\.mlp\.up_proj\.weight",
        "no tensors": "would change nothing",
    }
    for number, (damage, message) in enumerate(names.items()):
        adapter = save_adapter(tmp_path / str(number), llama)
        rewrite(adapter, DAMAGE[damage])
        with pytest.raises(ModelNotFoundError, match=rf"adapter_model\.safetensors is damaged: .*{message}"):
            load(llama, template=PROMPT, adapter=adapter)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_files_of_an_adapter_that_are_damaged(name: str, llama: Path, tmp_path: Path) -> None:
    """Cut anywhere or with a byte changed, an adapter is refused, or is one that PEFT would have read so too."""
    path = save_adapter(tmp_path / "adapter", llama) / name
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little") if name.endswith("safetensors") else len(whole)
    for place in range(0, header, max(1, header // 30)):
        for data in (whole[:place], whole[:place] + b"\xff" + whole[place + 1 :], whole[:place] + b"[" * 9000):
            path.write_bytes(data)
            with pytest.raises(GratingError, match=r"adapter"):
                Adapter(path.parent)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ModelNotFoundError, match="not a regular file"):
        Adapter(path.parent)


# What is merged


@pytest.mark.parametrize("rooted", [False, True])
def test_ranks_by_module(llama: Path, tmp_path: Path, rooted: bool) -> None:
    """As PEFT has it: the first pattern that matches counts, and the scale goes by the rank of the module."""
    adapter = save_adapter(tmp_path / "adapter", llama)
    pattern = {"layers.1.mlp.up_proj": 2, "up_proj": 3, r"layers\.[34]\.self_attn\.q_proj": 1}

    def narrow(settings: dict[str, Any], tensors: Tensors) -> None:
        settings |= {"rank_pattern": pattern, "use_rslora": rooted, "target_modules": TARGETS}
        for name, tensor in tensors.items():
            wanted = 3 if "up_proj" in name else 1 if "q_proj" in name and ("3" in name or "s.4" in name) else 4
            wanted = 2 if "layers.1.mlp.up_proj" in name else wanted
            tensors[name] = tensor[:wanted] if "lora_A" in name else tensor[:, :wanted]

    rewrite(adapter, narrow)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32, attn_implementation="eager").eval()
    tensors = load_file(adapter / "adapter_model.safetensors")
    with torch.no_grad():
        for name, down in tensors.items():
            if "lora_A" in name:
                weight = model.get_parameter(name.removeprefix(BEFORE).replace("lora_A.", ""))
                scale = 6 / (math.sqrt(len(down)) if rooted else len(down))
                weight += scale * tensors[name.replace("lora_A", "lora_B")] @ down
    scores = load(llama, template=PROMPT, adapter=adapter).score(PAIRS)
    assert scores == pytest.approx(expected_scores(llama, model), abs=TOLERANCE)


@pytest.mark.parametrize("base", ["llama", "tied"])
@pytest.mark.parametrize("how", ["whole", "low-rank", "both"])
def test_the_output_embedding_of_an_asked_model(
    base: str, how: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Trained whole (``modules_to_save``), adapted, or adapted with the copy of the base that PEFT keeps then."""
    directory = request.getfixturevalue(base)
    adapter = save_adapter(tmp_path / "adapter", directory)
    model = merged(directory, adapter, 1.5)
    output = model.lm_head.weight.detach().clone()
    added: Tensors = {}
    settings: dict[str, Any] = {}
    if how == "whole":
        output = torch.randn(210, 32)
        settings["modules_to_save"] = ["lm_head"]
        added[f"{BEFORE}lm_head.weight"] = output
    else:
        down, up = 0.3 * torch.randn(4, 32), 0.3 * torch.randn(210, 4)
        if how == "both":
            added[f"{BEFORE}lm_head.base_layer.weight"] = output.clone()
        added |= {f"{BEFORE}lm_head.lora_A.weight": down, f"{BEFORE}lm_head.lora_B.weight": up}
        output = output + 1.5 * up @ down
    rewrite(adapter, lambda s, tensors: (s.update(settings), tensors.update(added)))
    model.lm_head.weight = torch.nn.Parameter(output)
    scores = load(directory, template=PROMPT, adapter=adapter).score(PAIRS)
    assert scores == pytest.approx(expected_scores(directory, model), abs=TOLERANCE)


@pytest.mark.parametrize("family", ["tiny_bert", "llama"])
def test_a_classifier_that_was_trained_along(family: str, tiny_bert: Path, tmp_path: Path) -> None:
    """PEFT lists the heads of several architectures in ``modules_to_save``, and saves the one that is there."""
    directory = tmp_path / "model"
    if family == "llama":
        save_model(directory, "llama")
        head, names, changed = ["score.weight"], [], "model.layers.1.self_attn.q_proj"
    else:
        directory = tiny_bert
        head, names = ["classifier.weight", "classifier.bias"], ["bert.pooler.dense.bias"]
        changed = "bert.encoder.layer.1.attention.self.query"
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32)
    torch.manual_seed(5)
    replaced = {name: torch.randn_like(model.get_parameter(name)) for name in (*head, *names)}
    weight = model.get_parameter(f"{changed}.weight")
    down, up = torch.randn(4, weight.shape[1]), torch.randn(len(weight), 4)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    tensors = {f"{BEFORE}{name}": weight for name, weight in replaced.items()}
    tensors |= {f"{BEFORE}{changed}.lora_A.weight": down, f"{BEFORE}{changed}.lora_B.weight": up}
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "modules_to_save": ["classifier", "score"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with torch.no_grad():
        for name, trained in replaced.items():
            model.get_parameter(name).copy_(trained)
        weight += 2 * up @ down
    model.save_pretrained(tmp_path / "merged")
    save_tokenizer(tmp_path / "merged", types=family == "tiny_bert")
    pairs = PAIRS[:3] + PAIRS[4:]  # a padded batch takes an empty text for none
    expected = load(tmp_path / "merged").score(pairs)
    assert load(directory, adapter=adapter).score(pairs) == pytest.approx(expected, abs=TOLERANCE)
    assert load(directory).score(pairs) != pytest.approx(expected, abs=1e-2)


# Identity


def identities(base: Path, adapter: Path) -> str:
    return fingerprint(base, Adapter(adapter), PROMPT.asked)


def test_what_changes_scores_changes_the_identity(llama: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", llama)
    first = identities(llama, adapter)
    found = [
        first,
        fingerprint(llama),
        fingerprint(llama, Adapter(adapter)),
        fingerprint(llama, None, PROMPT.asked),
    ]
    found.append(fingerprint(llama, Adapter(adapter), Prompt(PROMPT.pieces, yes="w4", no="w3").asked))
    for changes in (
        say(lora_alpha=7),
        say(lora_alpha=6, use_rslora=True),
        put(UP, with_value(0.125)),  # a single number in the middle of one tensor
        put(DOWN, lambda tensor: tensor.flip(0)),  # the same sums
        lambda s, t: t.update({f"{BEFORE}lm_head.weight": torch.zeros(210, 32)}),
    ):
        copy = save_adapter(tmp_path / str(len(found)), llama)
        rewrite(copy, changes)
        found.append(identities(llama, copy))
    assert len(set(found)) == len(found)
    # What changes nothing of the scores changes nothing of it.
    again = save_adapter(tmp_path / "again", llama)
    rewrite(again, say(lora_dropout=0.3, base_model_name_or_path="elsewhere", inference_mode=False))
    assert identities(llama, again) == first


def test_the_identity_is_the_same_with_any_number_of_threads(tmp_path: Path) -> None:
    """So many numbers that their sum depends on how threads divide them."""
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    torch.manual_seed(4)
    tensors = {DOWN: torch.randn(4, 100_000), UP: torch.randn(100_000, 4)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    usual, found = torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            found.add(Adapter(tmp_path).identity)
    finally:
        torch.set_num_threads(usual)
    assert len(found) == 1


def test_nothing_that_belongs_to_another_adapter_is_used(
    llama: Path, tmp_path: Path, spill_directory: Path
) -> None:
    """A lens, the state of recalibration and the file of columns, when only ``lora_alpha`` is another."""
    one, other = (save_adapter(tmp_path / name, llama) for name in ("one", "other"))
    rewrite(other, say(lora_alpha=7))
    lens = calibrated(fingerprint(llama, Adapter(one), PROMPT.asked))
    lens = type(lens)(type(lens.lens)(lens.lens.maps, "last"), lens.margins, lens.fingerprint, lens.summary)
    lens.save(lens_directory(lens.fingerprint))
    how = {"template": PROMPT, "pruning": "auto", "recalibrate": 1.0}
    first, second = (load(llama, adapter=adapter, **how) for adapter in (one, other))
    assert first.lens is not None
    assert second.lens is None
    for reranker in (first, second):
        reranker.close()
    assert first.identity != second.identity
    for adapter in (one, other):
        StreamedCausalLM.from_pretrained(
            llama, device="cpu", dtype="float32", adapter=adapter, mlp_density=0.5
        ).close()
    assert len(list((spill_directory / "columns").iterdir())) == 2
    documents = [" ".join(WORDS[number : number + 9]) for number in range(8)]
    expected = load(llama, template=PROMPT, adapter=other).score([(QUERY, text) for text in documents])
    assert expected != load(llama, template=PROMPT, adapter=one).score([(QUERY, text) for text in documents])
