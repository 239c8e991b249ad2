"""The pass over prompts and tokens against transformers' whole model, for every family of decoders."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from grating_core.engine.decode import advance, new_cache
from grating_core.errors import ScoreError
from grating_core.models.causal_lm import CausalLM
from tests.core.conftest import WINDOW
from tests.core.memory.conftest import planned_lm
from tests.core.models.test_decoders import CAUSAL, save_decoder
from tests.core.parity import TOLERANCE, going_on

IDS = torch.randint(4, 200, (WINDOW,), generator=torch.Generator().manual_seed(5)).tolist()
STREAMED: dict[str, object] = {"resident": ()}
SOME: dict[str, object] = {"resident": (2, 5)}


@pytest.fixture(scope="module", params=CAUSAL)
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def reference(decoder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.float32, attn_implementation="eager")


def load(directory: Path, **changes: object) -> CausalLM:
    stored, plan = planned_lm(directory, **changes)
    return stored.load(plan)


def one_by_one(model: CausalLM, prompt: int, until: int, slice_tokens: int = 64) -> Tensor:
    """The logits after a prompt of so many tokens, and after every token behind it."""
    cache = new_cache(model, until)
    found = [advance(model, IDS[:prompt], cache, slice_tokens=slice_tokens)]
    found += [advance(model, [token], cache, slice_tokens=slice_tokens) for token in IDS[prompt:until]]
    assert [kept.tokens for kept in cache.layers] == [until] * model.depth
    return torch.stack(found)


@pytest.mark.parametrize(
    ("prompt", "until", "slice_tokens"),
    [(1, 60, 64), (40, 44, 64), (40, 44, 7), (40, 44, 1), (WINDOW - 1, WINDOW, 50), (WINDOW, WINDOW, 10**6)],
)
def test_logits_equal_transformers(
    decoder: Path, reference: PreTrainedModel, prompt: int, until: int, slice_tokens: int
) -> None:
    found = one_by_one(load(decoder), prompt, until, slice_tokens)
    # In the same steps: the logits of these models go up to 9, and rounding differs by more than the tolerance
    # between one pass over all tokens and a pass for each. Gemma's differ so much even from exact ones.
    prefixes = [IDS[:prompt], *([token] for token in IDS[prompt:until])]
    logits = []
    for model in (reference, copy.deepcopy(reference).double()):
        step = going_on(model)
        with torch.inference_mode():
            logits.append(torch.stack([step(ids).logits[0, -1].double() for ids in prefixes]))
    rounding = float((logits[0] - logits[1]).abs().max())
    torch.testing.assert_close(found.double(), logits[1], atol=max(TOLERANCE, 3 * rounding), rtol=0)


@pytest.mark.parametrize("changes", [STREAMED, SOME], ids=["streamed", "some streamed"])
def test_streamed_layers_give_the_same_bits(decoder: Path, changes: dict[str, object]) -> None:
    stored, plan = planned_lm(decoder, **changes)
    whole, streamed = load(decoder), stored.load(plan)
    for _ in range(2):
        assert torch.equal(one_by_one(streamed, 20, 25), one_by_one(whole, 20, 25))
    # The prompt is one pass, each token after it another.
    assert streamed.meter.bytes_read == 2 * 6 * plan.bytes_read()
    streamed.close()


def test_embedding_rows_give_the_same_bits(tmp_path: Path) -> None:
    directory = save_decoder(tmp_path, "llama")
    whole, rows = load(directory), load(directory, **STREAMED, embedding_rows=3)
    assert torch.equal(one_by_one(rows, 20, 25), one_by_one(whole, 20, 25))
    assert rows.meter.rows_read > 3
    rows.close()


def test_tied_embeddings_are_there_once(tmp_path: Path) -> None:
    stored, plan = planned_lm(save_decoder(tmp_path, "llama-tied"))
    untied, larger = planned_lm(save_decoder(tmp_path / "untied", "llama"))
    table = stored.vocabulary * stored.spec.width * 4
    assert larger.sizes.rest - plan.sizes.rest == pytest.approx(table, abs=8192)
    stored.close()
    untied.close()


def test_keys_and_values_take_what_was_planned(tmp_path: Path) -> None:
    stored, plan = planned_lm(save_decoder(tmp_path, "llama"))
    cache = new_cache(stored.load(plan), WINDOW)
    for kept in cache.layers:
        kept.tokens = WINDOW
    assert sum(kept.key.nbytes + kept.value.nbytes for kept in cache.layers) == plan.sizes.keys


def test_logits_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = load(save_decoder(tmp_path, "llama"))
    model.outside["final_norm.weight"][3] = torch.nan
    with pytest.raises(ScoreError, match="logits are not all finite"):
        one_by_one(model, 3, 3)
