"""Heads made of sentence-transformers' modules, against its own CrossEncoder on the same files."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.base.modules.normalize import Normalize
from sentence_transformers.sentence_transformer.modules import Dropout, LayerNorm, Pooling
from torch import nn

from grating_core import ModelNotFoundError, Reranker, UnsupportedModelError
from grating_core.errors import BudgetError, FileError
from grating_core.models.identity import fingerprint
from tests.core.conftest import FAMILIES, WORDS, randomise, save_tokenizer
from tests.core.models.test_directory import run_shown
from tests.core.parity import TOLERANCE, load, random_text

WIDTH = 32
LENGTHS = [1, 0, 5, 17, 2, 90, 40, 300, 33, 1]  # length 1, none at all, and more than the window holds
ENCODERS = [
    "bert",
    "roberta",
    "xlm-roberta",
    "electra",
    "distilbert",
    "deberta-v3",
    "deberta-v2",
    "modernbert-cls",
]
HEADS: dict[str, Callable[[], list[nn.Module]]] = {
    "ettin": lambda: [
        Pooling(WIDTH, "cls"),
        Dense(WIDTH, WIDTH, bias=False, activation_function=nn.GELU()),
        LayerNorm(WIDTH),
        Dense(WIDTH, 1, activation_function=nn.Identity(), module_output_name="scores"),
    ],
    "mean": lambda: [
        Pooling(WIDTH, "mean"),
        LayerNorm(WIDTH),
        Dense(WIDTH, 7, activation_function=nn.SiLU(), module_output_name="small", use_residual=True),
        Dropout(0.5),
        Dense(7, 7, activation_function=nn.ReLU(), module_input_name="small", use_residual=True),
        Dense(7, 1, activation_function=nn.Sigmoid(), module_input_name="small", module_output_name="scores"),
    ],
    "last": lambda: [Pooling(WIDTH, "lasttoken"), Normalize(), Dense(WIDTH, 1, module_output_name="scores")],
}


def save_modular(directory: Path, family: str, head: str, **settings: object) -> Path:
    """A tiny reranker as CrossEncoder saves it: the family's transformer, and a head of modules."""
    torch.manual_seed(0)
    base = directory / "base"
    randomise(FAMILIES[family]()).base_model.save_pretrained(base)
    save_tokenizer(base, types=family in ("bert", "electra", "deberta-v2"))
    modules = HEADS[head]()
    for module in modules:
        for name, weight in module.named_parameters():
            nn.init.normal_(weight, mean=float("norm.weight" in name), std=0.3)
    CrossEncoder(modules=[Transformer(str(base)), *modules], device="cpu", **settings).save_pretrained(
        str(directory / "model")
    )
    shutil.rmtree(base)
    return directory / "model"


def reference(directory: Path, pairs: list[tuple[str, str]]) -> list[float]:
    model = CrossEncoder(str(directory), device="cpu", local_files_only=True)
    return [float(score) for score in model.predict(pairs, activation_fn=nn.Identity())]


@pytest.fixture
def ettin(tmp_path: Path) -> Path:
    return save_modular(tmp_path, "modernbert-cls", "ettin")


@pytest.mark.parametrize(
    ("family", "head"),
    [*((family, "ettin") for family in ENCODERS),
     ("bert", "mean"), ("modernbert-mean", "mean"), ("roberta", "last"), ("qwen3", "last"), ("gemma3", "last")],
)  # fmt: skip
def test_scores_equal_the_cross_encoders(tmp_path: Path, family: str, head: str) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)  # shown when the test fails
    pairs = pairs_of(random.Random(seed))
    directory = save_modular(tmp_path, family, head)
    expected = reference(directory, pairs)
    assert max(expected) - min(expected) > 100 * TOLERANCE
    assert load(directory).score(pairs) == pytest.approx(expected, abs=TOLERANCE)
    assert load(directory, slice_tokens=130).score(pairs) == pytest.approx(expected, abs=TOLERANCE)


def pairs_of(source: random.Random) -> list[tuple[str, str]]:
    query = random_text(3, source, WORDS)
    return [(query, random_text(length, source, WORDS)) for length in LENGTHS]


@pytest.mark.parametrize("head", ["ettin", "mean"])
def test_streamed_and_in_8_bits(tmp_path: Path, spill_directory: Path, head: str) -> None:
    directory = save_modular(tmp_path, "modernbert-cls", head)
    pairs = pairs_of(random.Random(5))
    expected = reference(directory, pairs)
    with pytest.raises(BudgetError) as told:
        load(directory, memory_budget="1KB")
    streamed = load(directory, memory_budget=told.value.smallest)
    assert streamed.plan is not None
    assert streamed.plan.streamed
    assert streamed.score(pairs) == pytest.approx(expected, abs=TOLERANCE)
    rounded = load(directory, dtype="int8").score(pairs)
    assert rounded == pytest.approx(expected, abs=0.2 * (max(expected) - min(expected)))


@pytest.mark.usefixtures("without_8_bits", "spill_directory")
def test_a_lens_knows_what_the_head_reads(ettin: Path, tmp_path: Path) -> None:
    source = random.Random(6)
    texts = [random_text(9, source, WORDS) for _ in range(60)]
    reranker = load(ettin)
    lens = reranker.calibrate(texts[:40], texts[20:], output=tmp_path / "lens", top_k=2, candidates=6, requests=20)
    assert lens.lens.pooling == "first"
    pruned = Reranker.from_pretrained(ettin, lens=tmp_path / "lens", dtype="float32", device="cpu")
    expected = dict(enumerate(reranker.score([(texts[0], text) for text in texts])))
    for ranked in pruned.rerank(texts[0], texts, top_k=3).ranking:
        assert ranked.score == pytest.approx(expected[ranked.index], abs=TOLERANCE)
    change(ettin, "1_Pooling/config.json", pooling_mode="mean")
    with pytest.raises(FileError, match=r"other (weights|model)"):
        Reranker.from_pretrained(ettin, lens=tmp_path / "lens", dtype="float32", device="cpu")


def test_a_prompt_goes_before_the_query(tmp_path: Path) -> None:
    settings = {"prompts": {"web": "w7 w8 w9 ", "none": ""}, "default_prompt_name": "web"}
    directory = save_modular(tmp_path, "modernbert-cls", "ettin", **settings)
    pairs = pairs_of(random.Random(1))
    expected = reference(directory, pairs)
    assert load(directory).score(pairs) == pytest.approx(expected, abs=TOLERANCE)
    change(directory, "config_sentence_transformers.json", default_prompt_name="none")
    assert load(directory).score(pairs) == pytest.approx(reference(directory, pairs), abs=TOLERANCE)
    assert load(directory).score(pairs) != pytest.approx(expected, abs=TOLERANCE)
    change(directory, "config_sentence_transformers.json", default_prompt_name="other")
    with pytest.raises(ModelNotFoundError, match="default_prompt_name='other', which is none of its prompts"):
        load(directory)
    change(directory, "config_sentence_transformers.json", default_prompt_name="web")
    change(directory, "1_Pooling/config.json", include_prompt=False)
    with pytest.raises(UnsupportedModelError, match="include_prompt=false"):
        load(directory)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_seq_length": 20},
        {"max_seq_length": 30, "processor_kwargs": {"model_max_length": 20, "padding_side": "left"}},
        {"max_seq_length": 30, "processing_kwargs": {"text": {"max_length": 20, "padding": "longest"}}},
        {"do_lower_case": True, "model_kwargs": {"attn_implementation": "eager"}},
    ],
)
def test_the_settings_of_the_transformer_are_honoured(ettin: Path, fields: dict[str, object]) -> None:
    pairs = [(query.upper(), text.title()) if "do_lower_case" in fields else (query, text)
             for query, text in pairs_of(random.Random(2))]  # fmt: skip
    before = load(ettin).score(pairs)
    change(ettin, "sentence_bert_config.json", **fields)
    found = load(ettin).score(pairs)
    assert found == pytest.approx(reference(ettin, pairs), abs=TOLERANCE)
    assert found != pytest.approx(before, abs=TOLERANCE)


def test_the_transformer_may_have_a_folder_of_its_own(ettin: Path) -> None:
    pairs = pairs_of(random.Random(3))
    change(ettin, "sentence_bert_config.json", max_seq_length=20)
    expected = load(ettin).score(pairs)
    modules = json.loads((ettin / "modules.json").read_text())
    (ettin / (folder := "0_Transformer")).mkdir()
    for path in ettin.iterdir():
        if path.is_file() and path.name not in ("modules.json", "config_sentence_transformers.json"):
            path.rename(ettin / folder / path.name)
    (ettin / "modules.json").write_text(json.dumps([modules[0] | {"path": folder}, *modules[1:]]))
    assert load(ettin).score(pairs) == expected
    assert expected == pytest.approx(reference(ettin, pairs), abs=TOLERANCE)


def test_another_module_is_another_model(ettin: Path) -> None:
    found = [fingerprint(ettin)]
    weights = load_file(ettin / "2_Dense/model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, ettin / "2_Dense/model.safetensors")
    found.append(fingerprint(ettin))
    change(ettin, "2_Dense/config.json", activation_function="torch.nn.modules.activation.Tanh")
    found.append(fingerprint(ettin))
    change(ettin, "1_Pooling/config.json", pooling_mode="mean")
    found.append(fingerprint(ettin))
    assert len(set(found)) == 4


def test_the_function_that_the_model_was_trained_with_is_known(ettin: Path) -> None:
    assert not load(ettin).shows_logits  # its files name a sigmoid
    change(ettin, "config_sentence_transformers.json", activation_fn="torch.nn.modules.linear.Identity")
    assert load(ettin).shows_logits


def change(directory: Path, file: str, **fields: object) -> None:
    path = directory / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_code_of_a_module_is_never_run(ettin: Path) -> None:
    modules = json.loads((ettin / "modules.json").read_text())
    modules[2]["type"] = "head.Dense"
    (ettin / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UnsupportedModelError, match=r"module head\.Dense, whose code.*is never run"):
        load(ettin)


def test_an_embedding_model_is_no_reranker(ettin: Path) -> None:
    change(ettin, "config_sentence_transformers.json", model_type="SentenceTransformer")
    with pytest.raises(UnsupportedModelError, match="makes embeddings, and no reranker"):
        load(ettin)
    (ettin / "modules.json").unlink()
    with pytest.raises(UnsupportedModelError, match=r"ModernBertModel.*makes embeddings.*no head"):
        load(ettin)


@pytest.mark.parametrize(
    ("file", "fields", "told"),
    [
        ("1_Pooling/config.json", {"pooling_mode": "max"}, "pooling_mode='max'"),
        ("1_Pooling/config.json", {"pooling_mode": ["cls", "mean"]}, "pooling_mode='cls, mean'"),
        ("2_Dense/config.json", {"activation_function": "torch.nn.modules.activation.Hardtanh"}, "Hardtanh"),
        ("2_Dense/config.json", {"activation_function": "evil.GELU"}, r"'evil\.GELU'"),
        ("2_Dense/config.json", {"module_input_name": "token_embeddings"}, "module_input_name='token_embeddings'"),
        ("4_Dense/config.json", {"module_output_name": "sentence_embedding"}, "give no scores"),
        ("4_Dense/config.json", {"out_features": 2}, "give 2 scores"),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "transformer_task='fill-mask'"),
        ("sentence_bert_config.json", {"tokenizer_name_or_path": "x"}, "tokenizer_name_or_path"),
        ("sentence_bert_config.json", {"processor_kwargs": {"truncation_side": "left"}}, "truncation_side"),
        ("sentence_bert_config.json", {"config_args": {"hidden_act": "relu"}}, r"config_args\.hidden_act"),
        ("sentence_bert_config.json", {"modality_config": {"image": {}}}, "is for image"),
        (
            "sentence_bert_config.json",
            {"modality_config": {"text": {"method": "forward", "method_output_name": ["hidden_states", -2]}}},
            "hidden_states",
        ),
    ],
)
def test_what_changes_the_score_is_refused_by_name(
    ettin: Path, file: str, fields: dict[str, object], told: str
) -> None:
    change(ettin, file, **fields)
    with pytest.raises(UnsupportedModelError, match=told):
        load(ettin)


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("modules.json", b"{", "modules.json cannot be read"),
        ("modules.json", b'[{"path": ""}]', "modules.json cannot be read: it lacks 'type'"),
        ("1_Pooling/config.json", None, r"1_Pooling/config.json is missing"),
        ("2_Dense/config.json", b"[]", r"2_Dense/config.json cannot be read"),
        ("2_Dense/config.json", b"{}", r"2_Dense/config.json cannot be read: it lacks 'out_features'"),
        ("2_Dense/model.safetensors", None, "2_Dense lacks model.safetensors"),
        ("2_Dense/model.safetensors", b"x", "as safetensors"),
        ("4_Dense/config.json", b'{"in_features": 31, "out_features": 1}', "4_Dense/config.json.* 31 features"),
    ],
)
def test_damaged_modules_are_told_apart(ettin: Path, file: str, content: bytes | None, told: str) -> None:
    path = ettin / file
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ModelNotFoundError, match=told):
        load(ettin)


def test_pickled_weights_of_a_module_are_named_with_a_command(ettin: Path) -> None:
    pairs = pairs_of(random.Random(4))
    expected = load(ettin).score(pairs)
    path = ettin / "2_Dense/model.safetensors"
    torch.save(load_file(path), path.with_name("pytorch_model.bin"))
    path.unlink()
    with pytest.raises(ModelNotFoundError, match=r"2_Dense lacks model\.safetensors.*never pickled") as refused:
        load(ettin)
    run_shown(str(refused.value))
    assert load(ettin).score(pairs) == expected


def test_a_module_of_another_model_is_refused(ettin: Path, tmp_path: Path) -> None:
    change(ettin, "1_Pooling/config.json", embedding_dimension=48)
    change(ettin, "2_Dense/config.json", in_features=48)
    with pytest.raises(ModelNotFoundError, match=r"2_Dense/config\.json.* 48 features.* have 32"):
        load(ettin)
    change(ettin, "1_Pooling/config.json", embedding_dimension=32)
    change(ettin, "2_Dense/config.json", in_features=32, bias=True)
    with pytest.raises(ModelNotFoundError, match=r"lack 2_Dense/linear\.bias, the head"):
        load(ettin)


def test_modules_without_pooling_are_refused(ettin: Path) -> None:
    modules = json.loads((ettin / "modules.json").read_text())
    (ettin / "modules.json").write_text(json.dumps([modules[0], *modules[2:]]))
    with pytest.raises(UnsupportedModelError, match=r"has Transformer, Dense, LayerNorm, Dense"):
        load(ettin)
