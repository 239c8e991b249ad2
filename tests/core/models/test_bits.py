"""Language models in 8 and 4 bits: quantised when they are first read, and kept in a companion file."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from grating_core import StreamedCausalLM
from grating_core.engine.decode import advance, new_cache
from grating_core.errors import BudgetError, FileError, StorageError
from grating_core.kernels import token_reference
from grating_core.kernels.groups import dequantized
from grating_core.kernels.token import Memories, Stack
from grating_core.layers.packed import fields_of, tensors_of
from grating_core.memory.checkpoint import SECTOR
from grating_core.models.causal_lm import CausalLM
from grating_core.models.packing import generating
from grating_core.models.stored_causal_lm import StoredCausalLM
from tests.core.conftest import WINDOW
from tests.core.memory.conftest import planned
from tests.core.models.test_decoders import save_decoder

BITS = (8, 4)
FAMILIES = ("llama", "llama-tied", "qwen3", "gemma2")
IDS = torch.randint(4, 200, (WINDOW,), generator=torch.Generator().manual_seed(21)).tolist()
TEXT = "w1 w2 w3"


@pytest.fixture(scope="module", params=FAMILIES)
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_decoder(tmp_path / "model", "llama-tied")


def stored_model(directory: Path, bits: int | None, kv_bits: int | None = None) -> StoredCausalLM:
    return StoredCausalLM(
        directory,
        device=torch.device("cpu"),
        dtype=torch.float32,
        lasting=True,
        packing=None if bits is None else generating(bits, torch.float32),
        kv_bits=kv_bits,
    )


def load(directory: Path, bits: int | None = 8, kv_bits: int | None = None, **changes: object) -> CausalLM:
    stored = stored_model(directory, bits, kv_bits)
    return stored.load(planned(stored, WINDOW, 64, **changes))


def logits(model: CausalLM, prompt: int = 20, until: int = 24) -> torch.Tensor:
    cache = new_cache(model, until)
    found = [advance(model, IDS[:prompt], cache, slice_tokens=64)]
    return torch.stack([*found, *(advance(model, [one], cache, slice_tokens=64) for one in IDS[prompt:until])])


def companion(cache: Path) -> Path:
    (path,) = (cache / "layers").glob("*.safetensors")
    return path


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("changes", [{"resident": ()}, {"resident": (2, 5)}], ids=["streamed", "some streamed"])
def test_streamed_weights_give_the_same_bits(decoder: Path, bits: int, changes: dict[str, object]) -> None:
    whole, streamed = load(decoder, bits), load(decoder, bits, **changes)
    assert torch.equal(logits(whole), logits(streamed))
    streamed.close()


@pytest.mark.parametrize("bits", BITS)
def test_logits_behind_a_prompt_in_bfloat16_are_a_product_of_one_row(decoder: Path, bits: int) -> None:
    how = {"bits": bits, "dtype": "bfloat16", "device": "cpu", "max_length": 64}
    with StreamedCausalLM.from_pretrained(decoder, **how) as generator:
        model = generator.model
        if model.token_path is None:
            pytest.skip("no kernel for one token")
        hidden = torch.randn(3, model.width, generator=torch.Generator().manual_seed(4)).bfloat16()
        row, nothing = hidden[-1].float(), (Stack(()), Memories(()), 0, 0, ())
        expected = token_reference.token(row, *nothing, model.token_path.output)
        assert expected is not None
        torch.testing.assert_close(model.logits(hidden), model.bounded(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", BITS)
def test_the_smallest_budget_gives_the_same_text(llama: Path, bits: int, spill_directory: Path) -> None:
    how = {"bits": bits, "dtype": "float32", "device": "cpu", "max_length": 64}
    with StreamedCausalLM.from_pretrained(llama, **how) as model:
        expected = model.generate(TEXT, max_new_tokens=12).text
    with pytest.raises(BudgetError) as told:
        StreamedCausalLM.from_pretrained(llama, memory_budget=1, **how)
    with StreamedCausalLM.from_pretrained(llama, memory_budget=told.value.smallest, **how) as model:
        assert model.plan is not None
        assert model.plan.total <= told.value.smallest
        assert model.generate(TEXT, max_new_tokens=12).text == expected


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_fewer_bits_take_fewer_bytes(tmp_path: Path, family: str) -> None:
    directory, taken = save_decoder(tmp_path, family), []
    for packing in (None, *(generating(bits, torch.float32) for bits in BITS)):
        stored = StoredCausalLM(directory, device=torch.device("cpu"), dtype=torch.float32, packing=packing)
        sizes = stored.sizes(WINDOW)
        taken.append((sum(sizes.layers), sizes.rest + sizes.vocabulary * sizes.row))
        stored.close()
    layers, others = zip(*taken, strict=True)
    assert layers[0] > 1.5 * layers[1] > 1.5 * layers[2]
    assert others[0] > others[1] == others[2]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("written", [True, False])
def test_weights_in_memory_are_held_once(
    decoder: Path, bits: int, spill_directory: Path, monkeypatch: pytest.MonkeyPatch, *, written: bool
) -> None:
    if not written:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    model = load(decoder, bits)
    assert len(list(spill_directory.glob("layers/*.safetensors"))) == written
    layers = []
    for number in range(1, model.depth + 1):
        with model.layer(number) as layer:
            layers.append(layer.weights)
    planned = stored_model(decoder, bits).sizes(WINDOW).layers
    # What begins at a sector may take one more, and each layer is whole sectors.
    assert sum(planned) - len(layers) * SECTOR < held(*map(tensors_of, layers)) <= sum(planned) + SECTOR
    assert model.output is not None
    output = fields_of(model.output)
    assert held(output) <= sum(tensor.nbytes for tensor in output.values()) + 2 * SECTOR


def held(*parts: dict[str, torch.Tensor]) -> int:
    """The bytes of memory that some tensors keep."""
    pieces = [tensor.untyped_storage() for part in parts for tensor in part.values()]
    return sum({piece.data_ptr(): piece.nbytes() for piece in pieces}.values())


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:5000], lambda data: b""])
def test_a_damaged_file_is_refused_and_written_anew(llama: Path, spill_directory: Path, damage) -> None:
    expected = logits(load(llama))
    path = companion(spill_directory)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(FileError, match="delete the file"):
        load(llama)
    path.unlink()
    assert torch.equal(logits(load(llama)), expected)


def test_a_flipped_bit_is_found(llama: Path, spill_directory: Path) -> None:
    load(llama)
    path = companion(spill_directory)
    data = bytearray(path.read_bytes())
    data[len(data) - 10_000] ^= 1  # in the output embedding, which comes last
    path.write_bytes(data)
    with pytest.raises(FileError, match=r"layer 6 is damaged; delete the file"):
        load(llama)


def test_a_file_of_other_weights_is_refused(llama: Path, spill_directory: Path) -> None:
    load(llama)
    mine = companion(spill_directory)
    changed = AutoModelForCausalLM.from_pretrained(llama)
    changed.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1
    changed.save_pretrained(llama, max_shard_size="60KB")
    load(llama)
    (other,) = set((spill_directory / "layers").iterdir()) - {mine}
    shutil.copy(mine, other)
    with pytest.raises(FileError, match=r"other weights.*delete the file"):
        load(llama)


def test_a_full_disk_matters_only_to_streamed_layers(
    llama: Path, spill_directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = logits(load(llama))
    companion(spill_directory).unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert torch.equal(logits(load(llama)), expected)
    assert "quantised whenever the model is loaded" in caplog.text
    with pytest.raises(StorageError, match=r"quantised layers is missing.*leave bits or memory_budget out"):
        load(llama, resident=())
    assert not list((spill_directory / "layers").iterdir())


@pytest.mark.parametrize("bits", BITS)
def test_logits_are_those_of_the_dequantised_weights(decoder: Path, bits: int) -> None:
    model = load(decoder, bits)
    reference = AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.float32, attn_implementation="eager")
    put_dequantised(reference, model)
    with torch.inference_mode():
        expected = reference(torch.tensor([IDS[:24]])).logits[0, 19:]
    found = logits(model)
    torch.testing.assert_close(found[0], expected[0], atol=1e-4, rtol=0)
    # A kernel for one token rounds what it multiplies to 8 bits; a prompt is computed without.
    torch.testing.assert_close(found[1:], expected[1:], atol=0.3, rtol=0)


@pytest.mark.parametrize("bits", [None, 4])
def test_keys_and_values_in_8_bits_change_little_and_not_by_slice(decoder: Path, bits: int | None) -> None:
    expected, model = logits(load(decoder, bits)), load(decoder, bits, kv_bits=8)
    found = logits(model)
    assert 0 < (found - expected).abs().max() < 0.3
    assert (found - expected).abs().mean() < 0.03
    by_slices = new_cache(model, 24)
    torch.testing.assert_close(advance(model, IDS[:20], by_slices, slice_tokens=7), found[0], atol=1e-4, rtol=0)
    streamed = load(decoder, bits, kv_bits=8, resident=())
    assert torch.equal(logits(streamed), found)
    streamed.close()


def test_keys_and_values_in_8_bits_take_what_was_planned(llama: Path) -> None:
    taken = {}
    for kv_bits in (None, 8):
        stored = StoredCausalLM(llama, device=torch.device("cpu"), dtype=torch.float32, kv_bits=kv_bits)
        taken[kv_bits] = stored.sizes(WINDOW).keys
        cache = new_cache(stored.load(None), WINDOW)
        kept = sum(field.nbytes for layer in cache.layers for field in layer.memory if field is not None)
        assert kept <= taken[kv_bits] <= 2 * kept
    assert taken[8] < 0.7 * taken[None]


def put_dequantised(reference: torch.nn.Module, model: CausalLM) -> None:
    """Replace the weights of a model of transformers by those that a quantised one stands for."""
    names = {
        "query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj",
        "output": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
    }  # fmt: skip
    for number, layer in enumerate(reference.model.layers, 1):
        with model.layer(number) as mine:
            for role, name in names.items():
                layer.get_submodule(name).weight.data = dequantized(mine.weights.products[role])
    output = model.output
    assert output is not None
    if reference.config.tie_word_embeddings:
        reference.model.embed_tokens.weight.data = dequantized(output)
    reference.lm_head.weight.data = dequantized(output)


@pytest.mark.parametrize("bits", [0, 16, 4.5, "8", True])
def test_other_bits_are_refused(bits: object) -> None:
    with pytest.raises(ValueError, match=rf"^bits={bits!r} must be 8 or 4"):
        StreamedCausalLM.from_pretrained("owner/name", bits=bits)
    with pytest.raises(ValueError, match=rf"^kv_bits={bits!r} must be 8, the bits of keys"):
        StreamedCausalLM.from_pretrained("owner/name", kv_bits=bits)


def test_what_does_not_go_with_bits_is_refused(llama: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype='float16' does not go with bits=8: use dtype='auto'"):
        StreamedCausalLM.from_pretrained(llama, bits=8, dtype="float16", device="cpu")
    if torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"bits=8 is for the CPU.*device='cpu'"):
            StreamedCausalLM.from_pretrained(llama, bits=8, device="cuda")
