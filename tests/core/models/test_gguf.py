"""Language models in GGUF files against transformers' models with the weights that the files stand for."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from grating_core import BudgetError, ModelNotFoundError, StreamedCausalLM, UnsupportedModelError
from grating_core.engine.decode import advance, new_cache
from grating_core.errors import FileError
from grating_core.models.adapter import Adapter
from grating_core.models.stored_causal_lm import StoredCausalLM
from tests.core.conftest import DECODER, SIZES, WINDOW, randomise
from tests.core.gguf_files import write_gguf
from tests.core.models.test_decoders import CAUSAL
from tests.core.parity import TOLERANCE, load

LLAMA3 = {"rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 24}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": WINDOW // 4}
MODELS = {name: make for name, make in CAUSAL.items() if name != "qwen3-sliding"} | {
    "llama-biased": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **DECODER, attention_bias=True)),
    "llama-3": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **DECODER, rope_parameters=LLAMA3)),
    "llama-yarn": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **DECODER, rope_parameters=YARN)),
}
IDS = random.Random(5).choices(range(210), k=70)
BLOCKS = [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K]
LARGE = {**SIZES, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 310,
         "initializer_range": 0.05}  # fmt: skip


def stored(path: Path, **how: Any) -> StoredCausalLM:
    return StoredCausalLM(path, **{"device": torch.device("cpu"), "dtype": torch.float32, **how})


def logits(path: Path, *parts: list[int], **how: Any) -> torch.Tensor:
    """What comes out behind a sequence that comes in parts."""
    model = stored(path, **how).load(None)
    cache = new_cache(model, sum(map(len, parts)))
    for part in parts:
        found = advance(model, part, cache, slice_tokens=16)
    return found


@torch.inference_mode()
def expected(model: nn.Module, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids])).logits[0, -1]


def made(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    model = randomise(make()).eval()
    model.set_attn_implementation("eager")
    return model


def large(**changed: Any) -> PreTrainedModel:
    """A model whose rows are whole blocks of any kind."""
    return made(lambda: LlamaForCausalLM(LlamaConfig(**{**LARGE, **changed}, num_key_value_heads=2)))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRATING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0])
@pytest.mark.parametrize("family", MODELS)
def test_logits_equal_transformers(family: str, kind: Kind, tmp_path: Path) -> None:
    if kind in (Kind.F16, Kind.BF16) and family not in ("llama", "gemma2", "phi3"):
        pytest.skip("other families add nothing here")
    model = made(MODELS[family])
    path = write_gguf(tmp_path / "model.gguf", model, kind)
    found = logits(path, IDS)
    # Q8_0 has scales of 16 bits, and so have the kernels.
    torch.testing.assert_close(found, expected(model, IDS), atol=TOLERANCE, rtol=0)
    assert float(found.std()) > 0.05
    one_by_one = logits(path, IDS[:-2], IDS[-2:-1], IDS[-1:])
    # A single token is rounded to 8 bits before it meets a matrix of few bits.
    near = TOLERANCE if kind != Kind.Q8_0 else 0.2 * float(found.std())
    torch.testing.assert_close(one_by_one, found, atol=near, rtol=0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_stay_what_they_are(kind: Kind, tied: bool, tmp_path: Path) -> None:
    model = large(tie_word_embeddings=tied)
    path = write_gguf(tmp_path / "model.gguf", model, kind)
    found, wanted = logits(path, IDS), expected(model, IDS)
    # Of two scales in a block the product is rounded to 16 bits; groups of Q6_K are quantised again.
    near = {Kind.Q4_K: 2e-3, Kind.Q5_K: 2e-3, Kind.Q6_K: 0.1}.get(kind, TOLERANCE)
    assert float((found - wanted).abs().max()) <= near * max(1.0, float(wanted.std()))
    packing = stored(path).load(None).packing
    assert packing is not None
    assert set(packing.kinds[1].values()) == {kind.name}
    assert len(packing.kinds[1]) == 7


def test_kinds_may_differ_by_role_and_layer(tmp_path: Path, cache: Path) -> None:
    """As in files named Q4_K_M."""

    def kind(name: str) -> Kind:
        if name.startswith(("blk.1.ffn_down", "blk.0.attn_v", "token_embd")):
            return Kind.Q6_K
        return Kind.F16 if "attn_output" in name else Kind.Q4_K

    model = large(num_hidden_layers=4)
    path = write_gguf(tmp_path / "model.gguf", model, kind)
    found = logits(path, IDS)
    assert float((found - expected(model, IDS)).abs().max()) < 0.1 * float(found.std())
    with closing(stored(path, lasting=True)) as files:
        plan = replace(files.plan(80, 10**9), resident=())
        streamed = files.load(plan)
        written = advance(streamed, IDS, new_cache(streamed, 80), slice_tokens=16)
        assert torch.equal(written, found)
        assert streamed.meter.bytes_read > 0
    [file] = (cache / "layers").iterdir()
    # A second model finds the file, and one without a budget reads it, too.
    before = file.stat().st_mtime_ns
    assert torch.equal(logits(path, IDS), found)
    assert file.stat().st_mtime_ns == before
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 255
    file.write_bytes(damaged)
    with pytest.raises(FileError, match="damaged"):
        logits(path, IDS)


@pytest.mark.slow  # both import torch
def test_two_processes_write_the_companion_file_at_once(tmp_path: Path, cache: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", large(num_hidden_layers=4), Kind.Q4_0)
    code = (
        "import sys, torch; from dataclasses import replace; from pathlib import Path\n"
        "from grating_core.models.stored_causal_lm import StoredCausalLM\n"
        "files = StoredCausalLM(Path(sys.argv[1]), device=torch.device('cpu'), dtype=torch.float32)\n"
        "model = files.load(replace(files.plan(80, 10**9), resident=()))\n"
        "print(model.spec.depth)"
    )
    run = [sys.executable, "-c", code, str(path)]
    both = [subprocess.Popen(run, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in both] == ["4", "4"]
    assert len(list((cache / "layers").glob("*.safetensors"))) == 1


def test_without_kernels_blocks_become_floats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grating_core.models.stored.kernels", lambda: SimpleNamespace(has=lambda dtype: False))
    model = large()
    path = write_gguf(tmp_path / "model.gguf", model, Kind.Q6_K)
    loaded = stored(path).load(None)
    assert loaded.packing is None
    torch.testing.assert_close(logits(path, IDS), expected(model, IDS), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"general.architecture": "mamba"}, UnsupportedModelError, "'mamba'; supported.*llama, qwen2"),
        ({"split.count": 3}, UnsupportedModelError, "one of 3 parts.*--merge"),
        ({"llama.expert_count": 8}, UnsupportedModelError, "num_experts=8"),
        ({"llama.rope.dimension_count": 6}, UnsupportedModelError, "rope.dimension_count=6"),
        ({"llama.attention.causal": False}, UnsupportedModelError, "is_causal=False"),
        ({"llama.block_count": 4}, ModelNotFoundError, "num_hidden_layers=4"),
        ({"llama.attention.head_count": 0}, ModelNotFoundError, "num_attention_heads=0"),
        ({"llama.feed_forward_length": 64}, ModelNotFoundError, "intermediate_size=64"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, ModelNotFoundError, "rms_norm_eps"),
        ({"llama.rope.scaling.type": "new", "llama.rope.scaling.factor": 2.0}, UnsupportedModelError, "'new'"),
    ],
)
def test_what_makes_no_sense_is_refused(
    changed: dict[str, Any], error: type[Exception], said: str, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "model.gguf", made(MODELS["llama"]), Kind.Q8_0, changed=changed)
    with pytest.raises(error, match=rf"model\.gguf.*{said}"):
        stored(path)


def test_missing_and_unknown_tensors_are_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", made(MODELS["llama"]), Kind.F32)
    data = path.read_bytes()
    for old, new, said in (
        (b"blk.1.ffn_up.weight", b"blk.1.ffn_um.weight", "ffn_um.weight, which grating's LlamaForCausalLM"),
        (b"token_embd.weight", b"token_embe.weight", "lack token_embd.weight"),
        (b"output_norm.weight", b"output_norn.weight", "lack 1 tensors.*model.norm.weight"),
    ):
        path.write_bytes(data.replace(old, new))
        with pytest.raises((ModelNotFoundError, UnsupportedModelError), match=said):
            stored(path)


def test_a_type_that_grating_does_not_read_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", made(MODELS["llama"]), Kind.Q8_0)
    data = path.read_bytes()
    name = b"blk.1.ffn_up.weight"
    place = data.index(name) + len(name) + 4 + 2 * 8
    path.write_bytes(data[:place] + (16).to_bytes(4, "little") + data[place + 4 :])
    with pytest.raises(UnsupportedModelError, match=r"blk.1.ffn_up.weight as IQ2_XXS.*such as one named Q8_0"):
        stored(path)


def test_a_reranker_and_a_language_model_from_one_file(tmp_path: Path, cache: Path) -> None:
    model = large(num_hidden_layers=4, max_position_embeddings=512)
    path = write_gguf(tmp_path / "model.gguf", model, Kind.Q8_0, tokenizer=True)
    texts = [("a question", text) for text in ("a text", "", "another text. " * 9)]
    with load(path) as reranker:
        scores = reranker.score(texts)
        assert reranker.score(texts[1:2]) == pytest.approx(scores[1:2], abs=1e-5)
    with pytest.raises(BudgetError) as told:
        load(path, memory_budget=1)
    with load(path, memory_budget=told.value.smallest) as reranker:
        assert reranker.score(texts) == pytest.approx(scores, abs=TOLERANCE)
    assert max(scores) - min(scores) > 0.01
    settings = {"dtype": "float32", "device": "cpu"}
    with StreamedCausalLM.from_pretrained(path, **settings) as generator:
        text = generator.generate("a question", max_new_tokens=5).text
    with StreamedCausalLM.from_pretrained(path, memory_budget="100MB", **settings) as generator:
        assert generator.generate("a question", max_new_tokens=5).text == text


def test_pruned_mlps_and_other_bits_read_blocks(tmp_path: Path, cache: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", large(), Kind.Q8_0, tokenizer=True)
    settings = {"dtype": "float32", "device": "cpu"}
    texts = []
    for how in ({}, {"mlp_density": 1.0}, {"bits": 8}):
        with StreamedCausalLM.from_pretrained(path, **settings, **how) as generator:
            texts.append(generator.generate("a question", max_new_tokens=4).text)
    assert texts[0] == texts[1] == texts[2]


def test_an_adapter_replaces_no_norm_of_a_file(tmp_path: Path) -> None:
    """The file has Gemma's norms plus one, and the adapter has them without."""
    path = write_gguf(tmp_path / "model.gguf", made(MODELS["gemma2"]), Kind.F32)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(
        {"base_model.model.model.norm.weight": torch.ones(SIZES["hidden_size"])},
        adapter / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "modules_to_save": ["norm"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=r"replaces model\.norm\.weight.*merge_and_unload"):
        stored(path, adapter=Adapter(adapter))
