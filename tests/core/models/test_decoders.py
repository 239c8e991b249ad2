"""Decoder rerankers against transformers: heads, prompts, shared prefixes, windows, adapters."""

import json
import math
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from grating_core import BudgetError, ModelNotFoundError, Prompt, Reranker, UnsupportedModelError
from tests.core.conftest import DECODER, SIZES, SLIDING, WINDOW, WORDS, randomise, save_tokenizer
from tests.core.memory.conftest import PLANS, load_planned
from tests.core.memory.test_parity import DropHalf
from tests.core.parity import TOLERANCE, load, random_text

PROMPT = Prompt(
    pieces=("<s>", "w7 w8 w7 w8 {instruction} {query} w9", "w10 {document} w11 w12", "</s>"),
    yes="w3",
    no="w4",
    instruction="w20 w21",
)
CAUSAL = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **DECODER)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **DECODER, tie_word_embeddings=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, **DECODER, sliding_window=16)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, **DECODER)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, **DECODER, tie_word_embeddings=True)),
    "qwen3-sliding": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, **DECODER, **SLIDING)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SIZES, **DECODER)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **SIZES, **DECODER, sliding_window=16, query_pre_attn_scalar=9, attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
        )
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SIZES, **DECODER, sliding_window=16, query_pre_attn_scalar=9, sliding_window_pattern=3,
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        )
    ),
    "granite": lambda: GraniteForCausalLM(
        GraniteConfig(
            **SIZES, num_key_value_heads=2, max_position_embeddings=WINDOW, embedding_multiplier=3.0,
            attention_multiplier=0.2, residual_multiplier=0.4, logits_scaling=0.5,
        )
    ),
    "phi3": lambda: Phi3ForCausalLM(
        Phi3Config(
            **SIZES, num_key_value_heads=2, max_position_embeddings=4 * WINDOW,
            original_max_position_embeddings=WINDOW,
            rope_parameters={
                "rope_type": "longrope", "short_factor": [1.0, 1.2, 1.5, 2.0], "long_factor": [2.0, 3.0, 4.0, 5.0],
            },
        )
    ),
}  # fmt: skip
QUERY = "w1 w2 w5 w6"
LONG = 3000
SOURCE = random.Random(11)
DOCUMENTS = [random_text(length, SOURCE, WORDS) for length in (4, 30, 1, 0, 60, 7, 7, 25, 200)]


def save_decoder(directory: Path, family: str) -> Path:
    torch.manual_seed(0)
    model = randomise(CAUSAL[family]())
    model.save_pretrained(directory, max_shard_size="60KB")
    save_tokenizer(directory, types=False)
    return directory


@pytest.fixture(scope="module", params=CAUSAL)
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("qwen3"), "qwen3")


def token_ids(directory: Path, *pieces: str) -> list[int]:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    return [token for piece in pieces for token in tokenizer(piece, add_special_tokens=False)["input_ids"]]


def spelled_out(
    directory: Path, query: str, document: str, instruction: str = "w20 w21", window: int = WINDOW
) -> list[int]:
    """The token ids of :data:`PROMPT`, with as much of the document as fits."""
    before = token_ids(directory, "<s>", f"w7 w8 w7 w8 {instruction} {query} w9", "w10 ")
    after = token_ids(directory, " w11 w12", "</s>")
    return before + token_ids(directory, document)[: window - len(before) - len(after)] + after


@torch.inference_mode()
def reference(
    directory: Path,
    sequences: list[list[int]],
    yes: str = "w3",
    no: str | None = "w4",
    model: nn.Module | None = None,
) -> list[float]:
    """One left-padded batch through transformers' whole model, as model cards have it."""
    if model is None:
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        ).eval()
    longest = max(map(len, sequences))
    ids = torch.tensor([[1] * (longest - len(ids)) + ids for ids in sequences])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in sequences])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1]
    scores = logits[:, token_ids(directory, yes)[0]]
    return (scores if no is None else scores - logits[:, token_ids(directory, no)[0]]).tolist()


@pytest.mark.parametrize("slice_tokens", [1, 130, 10**6])
def test_scores_are_the_difference_of_the_answers_logits(decoder: Path, slice_tokens: int) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)  # shown when the test fails
    source = random.Random(seed)
    query = random_text(4, source, WORDS)
    documents = [random_text(length, source, WORDS) for length in (1, 0, 5, 17, 2, 90, 40, 300, 33, 1)]
    expected = reference(decoder, [spelled_out(decoder, query, document) for document in documents])
    assert max(expected) - min(expected) > 100 * TOLERANCE
    result = load(decoder, template=PROMPT, slice_tokens=slice_tokens).rerank(query, documents, len(documents))
    scores = {ranked.index: ranked.score for ranked in result.ranking}
    assert scores == pytest.approx(dict(enumerate(expected)), abs=TOLERANCE)
    assert result.trace.shared_prefix >= 12
    assert result.trace.compute_share == 1.0
    assert result.trace.truncated == (5, 7)


@cache
def whole_scores(directory: Path) -> list[float]:
    return load_planned(directory, template=PROMPT).score([(QUERY, document) for document in DOCUMENTS])


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_gives_the_same_bits(decoder: Path, plan: str, spill_directory: Path) -> None:
    planned = load_planned(decoder, template=PROMPT, **PLANS[plan])
    for _ in range(2):
        assert planned.score([(QUERY, document) for document in DOCUMENTS]) == whole_scores(decoder)


def test_sharing_the_prefix_changes_nothing(decoder: Path) -> None:
    reranker = load(decoder, template=PROMPT, slice_tokens=70)
    together = reranker.rerank(QUERY, DOCUMENTS).trace
    assert together.shared_prefix > 0
    alone = [reranker.rerank(QUERY, [document]).trace for document in DOCUMENTS]
    assert {trace.shared_prefix for trace in alone} == {0}
    for number, layer in enumerate(together.layers):
        assert layer.scores == pytest.approx([trace.layers[number].scores[0] for trace in alone], abs=TOLERANCE)
        assert layer.tokens < sum(trace.layers[number].tokens for trace in alone)


def test_queries_that_differ_share_what_they_can(qwen3: Path) -> None:
    pairs = [("w1 w2", "w30 w31"), ("w1 w3 w4", "w32"), ("w5", ""), ("w5", "w30 w31")]
    expected = reference(qwen3, [spelled_out(qwen3, *pair) for pair in pairs])
    assert load(qwen3, template=PROMPT).score(pairs) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("plan", PLANS)
def test_pruning_under_every_plan(qwen3: Path, plan: str, spill_directory: Path) -> None:
    whole, planned = (
        load_planned(qwen3, template=PROMPT, pruning=DropHalf(), **changes) for changes in ({}, PLANS[plan])
    )
    expected, found = (reranker.rerank(QUERY, DOCUMENTS, 2) for reranker in (whole, planned))
    assert found.ranking == expected.ranking
    assert found.trace.compute_share < 0.8
    full = dict(enumerate(whole.score([(QUERY, document) for document in DOCUMENTS])))
    assert {r.index: r.score for r in found.ranking} == pytest.approx(
        {r.index: full[r.index] for r in found.ranking}, abs=TOLERANCE
    )


def test_an_output_embedding_of_its_own_in_spite_of_the_configuration(qwen3: Path, tmp_path: Path) -> None:
    """transformers then does not tie the two, although the configuration says so."""
    model = AutoModelForCausalLM.from_pretrained(qwen3, dtype=torch.float32)
    model.config.save_pretrained(tmp_path)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    save_file(weights | {"lm_head.weight": torch.randn(210, 32)}, tmp_path / "model.safetensors", {"format": "pt"})
    save_tokenizer(tmp_path, types=False)
    expected = reference(tmp_path, [spelled_out(tmp_path, QUERY, text) for text in DOCUMENTS])
    scores = load(tmp_path, template=PROMPT).score([(QUERY, text) for text in DOCUMENTS])
    assert scores == pytest.approx(expected, abs=TOLERANCE)
    assert scores != pytest.approx(load(qwen3, template=PROMPT).score([(QUERY, text) for text in DOCUMENTS]))


def test_an_output_embedding_that_is_not_there(tmp_path: Path) -> None:
    directory = save_decoder(tmp_path / "model", "llama")
    for path in directory.glob("*.safetensors"):
        tensors = {name: tensor for name, tensor in load_file(path).items() if name != "lm_head.weight"}
        save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ModelNotFoundError, match=r"lack lm_head\.weight"):
        load(directory, template=PROMPT)


def test_the_instruction_is_a_parameter(qwen3: Path) -> None:
    expected = reference(qwen3, [spelled_out(qwen3, QUERY, text, "w40 w41 w42") for text in DOCUMENTS])
    reranker = load(qwen3, template=PROMPT, instruction="w40 w41 w42")
    assert reranker.score([(QUERY, text) for text in DOCUMENTS]) == pytest.approx(expected, abs=TOLERANCE)


def test_a_prompt_may_want_one_answer_only(qwen3: Path) -> None:
    prompt = Prompt(pieces=("<s>", "{query} w9", "{document}"), yes="w3", no=None)
    ids = [token_ids(qwen3, "<s>", "w1 w9", text) for text in ("w30", "w31 w32")]
    expected = reference(qwen3, ids, no=None)
    scores = load(qwen3, template=prompt).score([("w1", "w30"), ("w1", "w31 w32")])
    assert scores == pytest.approx(expected, abs=TOLERANCE)


def test_the_whole_output_embedding_is_never_read(tmp_path: Path) -> None:
    directory = save_decoder(tmp_path / "model", "llama")
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    path = directory / index["weight_map"]["lm_head.weight"]
    tensors = load_file(path)
    rows = tensors["lm_head.weight"]
    answers = token_ids(directory, "w3", "w4")
    expected = load(directory, template=PROMPT).score([(QUERY, "w50 w51")])
    rows[[row for row in range(len(rows)) if row not in answers]] = math.nan
    save_file(tensors, path, {"format": "pt"})
    reranker = load(directory, template=PROMPT)
    assert reranker.score([(QUERY, "w50 w51")]) == expected
    head = reranker.scorer.model.head
    assert {name: weight.shape for name, weight in head.items()} == dict.fromkeys(
        ("yes.weight", "no.weight"), (1, SIZES["hidden_size"])
    )


# Windows


@pytest.mark.parametrize("family", ["decoder", "encoder"])
def test_the_best_window_is_the_score(qwen3: Path, tiny_bert: Path, family: str) -> None:
    """Windows cover the document, overlap, and score as documents of their own do."""
    directory = qwen3 if family == "decoder" else tiny_bert
    how = {"template": PROMPT} if family == "decoder" else {}
    source = random.Random(5)
    words = [random_text(length, source, WORDS).split() for length in (400, 3, 0, 150)]
    windows, cut = (load(directory, long_documents=mode, **how) for mode in ("windows", "truncate"))
    result = windows.rerank(QUERY, [" ".join(text) for text in words], 4)
    assert result.trace.truncated == ()
    assert result.trace.compute_share == 1.0
    assert [count > 1 for count in result.trace.windows] == [True, False, False, True]
    whole = cut.rerank(QUERY, [" ".join(text) for text in words]).trace
    assert whole.truncated == (0, 3)
    fixed = whole.lengths[2]
    room = WINDOW - fixed
    step = room - room // 8
    for ranked in result.ranking:
        text = words[ranked.index]
        parts = [text[start : start + room] for start in range(0, max(1, len(text) - room // 8), step)]
        assert len(parts) == result.trace.windows[ranked.index]
        assert {word for part in parts for word in part} == set(text)
        expected = max(cut.score([(QUERY, " ".join(part)) for part in parts]))
        assert ranked.score == pytest.approx(expected, abs=TOLERANCE)


def test_windows_of_a_candidate_leave_together(qwen3: Path) -> None:
    documents = [random_text(length, SOURCE, WORDS) for length in (200, 5, 300, 90, 4)]
    reranker = load(qwen3, template=PROMPT, long_documents="windows", pruning="cluster")
    full = load(qwen3, template=PROMPT, long_documents="windows").rerank(QUERY, documents, 5)
    expected = {ranked.index: ranked.score for ranked in full.ranking}
    for ranked in reranker.rerank(QUERY, documents, 2).ranking:
        assert ranked.score == pytest.approx(expected[ranked.index], abs=TOLERANCE)


# Documents far longer than the steps that attention is taken in


LONG_DOCUMENTS = [random_text(length, SOURCE, WORDS) for length in (30, LONG, 5, 900)]


@pytest.fixture(scope="module", params=[{}, SLIDING | {"sliding_window": 600}], ids=["full", "sliding"])
def long_decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("long")
    torch.manual_seed(0)
    config = Qwen3Config(**SIZES, **DECODER | {"max_position_embeddings": LONG}, **request.param)
    randomise(Qwen3ForCausalLM(config)).save_pretrained(directory)
    save_tokenizer(directory, types=False)
    return directory


@pytest.fixture(scope="module")
def long_scores(long_decoder: Path) -> list[float]:
    """One by one: padded to the longest they would take gigabytes."""
    sequences = [spelled_out(long_decoder, QUERY, text, window=LONG) for text in LONG_DOCUMENTS]
    return [reference(long_decoder, [sequence])[0] for sequence in sequences]


@pytest.mark.parametrize("plan", ["resident", "all at once"])
def test_a_long_document_beside_short_ones(
    long_decoder: Path, long_scores: list[float], plan: str, spill_directory: Path
) -> None:
    reranker = load_planned(long_decoder, template=PROMPT, window=LONG, slice_tokens=1000, **PLANS[plan])
    trace = reranker.rerank(QUERY, LONG_DOCUMENTS).trace
    assert trace.layers[-1].scores == pytest.approx(long_scores, abs=TOLERANCE)
    assert (trace.lengths[1], trace.truncated) == (LONG, (1,))
    assert trace.shared_prefix >= 12


def test_a_long_document_alone(long_decoder: Path, long_scores: list[float]) -> None:
    reranker = load_planned(long_decoder, template=PROMPT, window=LONG)
    assert reranker.score([(QUERY, LONG_DOCUMENTS[1])]) == pytest.approx(long_scores[1:2], abs=TOLERANCE)


# MiniCPM: nothing in transformers to compare with, so the architecture is written out once more.


MINICPM = {
    "architectures": ["LayerWiseMiniCPMForCausalLM"], "model_type": "minicpm", "vocab_size": 210,
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu", "max_position_embeddings": WINDOW, "rms_norm_eps": 1e-5, "rope_theta": 500.0,
    "scale_emb": 3, "scale_depth": 1.4, "dim_model_base": 16, "start_layer": 3, "head_multi": True,
    "head_type": "simple", "tie_word_embeddings": True, "auto_map": {"AutoConfig": "never.LookedAt"},
}  # fmt: skip


def minicpm_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    width, inner, keys = 32, 48, 16
    shapes = {"model.embed_tokens.weight": (210, width), "model.norm.weight": (width,)}
    for layer in range(5):
        at = f"model.layers.{layer}."
        shapes |= {
            f"{at}self_attn.q_proj.weight": (width, width), f"{at}self_attn.k_proj.weight": (keys, width),
            f"{at}self_attn.v_proj.weight": (keys, width), f"{at}self_attn.o_proj.weight": (width, width),
            f"{at}mlp.gate_proj.weight": (inner, width), f"{at}mlp.up_proj.weight": (inner, width),
            f"{at}mlp.down_proj.weight": (width, inner), f"{at}input_layernorm.weight": (width,),
            f"{at}post_attention_layernorm.weight": (width,),
        }  # fmt: skip
    shapes |= {f"lm_head.{number}.linear_head.weight": (1, width) for number in range(3)}
    weights = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: weight + 1 if "norm" in name else weight for name, weight in weights.items()}


@torch.inference_mode()
def minicpm_scores(ids: list[int]) -> list[float]:
    """The score after each layer from the third on, by the published equations."""
    weights, count, size = minicpm_weights(), len(ids), 8

    def norm(states: torch.Tensor, name: str) -> torch.Tensor:
        return states * (states.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weights[name]

    def rotate(heads: torch.Tensor) -> torch.Tensor:
        angles = torch.arange(count)[:, None] * 500.0 ** (-torch.arange(0, size, 2) / size)
        angles = torch.cat((angles, angles), -1)
        left, right = heads.chunk(2, -1)
        return heads * angles.cos() + torch.cat((-right, left), -1) * angles.sin()

    states = 3 * weights["model.embed_tokens.weight"][torch.tensor(ids)]
    scores = []
    for layer in range(5):
        at = f"model.layers.{layer}."
        x = norm(states, f"{at}input_layernorm.weight")
        q, k, v = (
            (x @ weights[f"{at}self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, size)).transpose(0, 1)
            for name in "qkv"
        )
        q, k, v = rotate(q), rotate(k).repeat_interleave(2, 0), v.repeat_interleave(2, 0)
        future = torch.ones(count, count, dtype=torch.bool).triu(1)
        seen = (q @ k.transpose(1, 2) / size**0.5).masked_fill(future, -torch.inf).softmax(-1) @ v
        attended = seen.transpose(0, 1).flatten(1) @ weights[f"{at}self_attn.o_proj.weight"].T
        states = states + attended * 1.4 / 5**0.5
        x = norm(states, f"{at}post_attention_layernorm.weight")
        gate, up = (x @ weights[f"{at}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        states = states + (nn.functional.silu(gate) * up) @ weights[f"{at}mlp.down_proj.weight"].T * 1.4 / 5**0.5
        if layer >= 2:
            last = norm(states[-1], "model.norm.weight")
            scores.append(float(last @ weights[f"lm_head.{layer - 2}.linear_head.weight"][0]))
    return scores


@pytest.fixture(scope="module")
def minicpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("minicpm")
    (directory / "config.json").write_text(json.dumps(MINICPM))
    save_file(minicpm_weights(), directory / "model.safetensors", {"format": "pt"})
    save_tokenizer(directory, types=False)
    return directory


@pytest.mark.parametrize("plan", ["resident", "all at once"])
def test_minicpm_has_a_head_for_every_later_layer(minicpm: Path, plan: str, spill_directory: Path) -> None:
    prompt = Prompt(pieces=("<s>", "A: {query}", "w9", "B: {document}", "w9", "{instruction}"), instruction="w30")
    texts = ["w20 w21", "w22", "", "w23 w24 w25 w26"]
    ids = [token_ids(minicpm, "<s>", f"A: {QUERY}", "w9", f"B: {text}", "w9", "w30") for text in texts]
    expected = [minicpm_scores(sequence) for sequence in ids]
    layers = load_planned(minicpm, template=prompt, **PLANS[plan]).rerank(QUERY, texts).trace.layers
    for number in (3, 4, 5):
        after = [scores[number - 3] for scores in expected]
        assert layers[number - 1].scores == pytest.approx(after, abs=TOLERANCE)


@pytest.mark.parametrize("cutoff", [3, 4, 5])
def test_a_minicpm_may_end_at_any_layer_with_a_head(minicpm: Path, cutoff: int, spill_directory: Path) -> None:
    prompt = Prompt(pieces=("<s>", "{query}", "{document}"))
    texts = ["w20 w21", "w22", "w23 w24 w25 w26"]
    expected = [minicpm_scores(token_ids(minicpm, "<s>", QUERY, text))[cutoff - 3] for text in texts]
    with load(minicpm, template=prompt, cutoff_layers=cutoff) as reranker:
        assert reranker.score([(QUERY, text) for text in texts]) == pytest.approx(expected, abs=TOLERANCE)
        assert len(reranker.rerank(QUERY, texts).trace.layers) == cutoff
    for dtype, how in (("float32", {"abs": TOLERANCE}), ("int8", {"abs": 1.0})):
        settings = {"template": prompt, "cutoff_layers": cutoff, "dtype": dtype}
        with pytest.raises(BudgetError) as told:
            load(minicpm, memory_budget=1, **settings)
        with load(minicpm, memory_budget=told.value.smallest, **settings) as reranker:
            assert reranker.score([(QUERY, text) for text in texts]) == pytest.approx(expected, **how)


def test_the_layers_behind_the_last_are_not_read(minicpm: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(minicpm, tmp_path / "model"))
    expected = load(directory, cutoff_layers=4).score([(QUERY, "w20 w21")])
    weights = load_file(directory / "model.safetensors")
    for name, weight in weights.items():
        if name.startswith(("model.layers.4.", "lm_head.2.")):
            weight.fill_(math.nan)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    assert load(directory, cutoff_layers=4).score([(QUERY, "w20 w21")]) == expected


@pytest.mark.parametrize("cutoff", [0, 2, 6])
def test_a_layer_without_a_head_is_no_last_one(minicpm: Path, cutoff: int) -> None:
    with pytest.raises(ValueError, match=f"cutoff_layers={cutoff} must be"):
        load(minicpm, cutoff_layers=cutoff)


def test_other_models_have_one_head(qwen3: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="cutoff_layers=4 is for models with heads"):
        load(qwen3, template=PROMPT, cutoff_layers=4)


def test_minicpm_is_asked_as_it_was_trained(minicpm: Path) -> None:
    trace = load(minicpm).rerank("w1 w2", ["w3"]).trace
    instruction = (
        "Given a query A and a passage B, determine whether the passage contains an answer to the query by "
    )
    instruction += "providing a prediction of either 'Yes' or 'No'."
    # A newline is no token of this tokenizer.
    ids = token_ids(minicpm, "<s>", "A: w1 w2", "B: w3", instruction)
    assert trace.lengths == (len(ids),)
    assert trace.layers[-1].scores == pytest.approx([minicpm_scores(ids)[-1]], abs=TOLERANCE)


@pytest.fixture(scope="module")
def lightweight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 2 with the heads of bge-reranker-v2.5-gemma2-lightweight. transformers has its layers."""
    directory = tmp_path_factory.mktemp("lightweight")
    torch.manual_seed(5)
    model = randomise(CAUSAL["gemma2"]())
    own = {"start_layer": 3, "layer_sep": 1, "layer_wise": True, "architectures": ["CostWiseGemmaForCausalLM"]}
    stated = model.config.to_dict() | own | {"model_type": "cost_wise_gemma"}
    (directory / "config.json").write_text(json.dumps(stated))
    weights = {name: weight.clone() for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    weights |= {f"lm_head.{number}.linear_head.weight": torch.randn(1, 32) for number in range(3)}
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    save_tokenizer(directory, types=False)
    return directory


@torch.inference_mode()
def lightweight_scores(directory: Path, ids: list[int]) -> list[float]:
    """The score after each layer, by the first head and within the bound, as the published code has it."""
    model = CAUSAL["gemma2"]().eval()
    model.set_attn_implementation("eager")
    weights = load_file(directory / "model.safetensors")
    model.load_state_dict(weights, strict=False)
    states = model.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[1:]
    last = [model.model.norm(one[0, -1]) for one in states[:-1]] + [states[-1][0, -1]]
    return [float(3.0 * torch.tanh(weights["lm_head.0.linear_head.weight"][0] @ one / 3.0)) for one in last]


def test_the_lightweight_gemma_reads_with_its_first_head(lightweight: Path) -> None:
    asked = "Predict whether passage B contains an answer to query A."
    texts = ["w20 w21", "w22", "w23 w24 w25 w26 w27"]
    ids = [token_ids(lightweight, "<bos>", f"A: {QUERY}", f"B: {text}", asked) for text in texts]
    expected = [lightweight_scores(lightweight, sequence) for sequence in ids]
    assert load(lightweight, cutoff_layers=4).score([(QUERY, text) for text in texts]) == pytest.approx(
        [scores[3] for scores in expected], abs=TOLERANCE
    )
    layers = load(lightweight).rerank(QUERY, texts).trace.layers
    for number in range(1, 6):
        after = [scores[number - 1] for scores in expected]
        assert layers[number - 1].scores == pytest.approx(after, abs=TOLERANCE)


def test_a_minicpm_without_any_head_is_refused(minicpm: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(minicpm, tmp_path / "model"))
    (directory / "config.json").write_text(json.dumps(MINICPM | {"start_layer": 6}))
    with pytest.raises(ModelNotFoundError, match=r"config\.json has start_layer=6"):
        load(directory)


def test_other_heads_of_minicpm_are_refused(minicpm: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MINICPM | {"head_type": "raw"}))
    with pytest.raises(UnsupportedModelError, match="head_type='raw'"):
        Reranker.from_pretrained(tmp_path)


# Adapters


def save_adapter(directory: Path, base: Path, **settings: object) -> Path:
    """A LoRA adapter with random weights for all linear layers."""
    directory.mkdir()
    torch.manual_seed(8)
    tensors = {}
    for name, module in AutoModelForCausalLM.from_pretrained(base).named_modules():
        if isinstance(module, nn.Linear) and "layers" in name:
            tensors[f"base_model.model.{name}.lora_A.weight"] = 0.3 * torch.randn(4, module.in_features)
            tensors[f"base_model.model.{name}.lora_B.weight"] = 0.3 * torch.randn(module.out_features, 4)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "base_model_name_or_path": str(base)} | settings
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def merged(base: Path, adapter: Path, scale: float) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    tensors = load_file(adapter / "adapter_model.safetensors")
    with torch.no_grad():
        for name, down in tensors.items():
            if "lora_A" in name:
                weight = model.get_parameter(name.removeprefix("base_model.model.").replace("lora_A.", ""))
                weight += scale * tensors[name.replace("lora_A", "lora_B")] @ down
    return model


@pytest.mark.parametrize(("settings", "scale"), [({}, 1.5), ({"use_rslora": True}, 3.0)])
@pytest.mark.parametrize("plan", ["resident", "streamed", "some streamed"])
def test_an_adapter_is_merged_whenever_weights_are_read(
    qwen3: Path, tmp_path: Path, settings: dict, scale: float, plan: str
) -> None:
    adapter = save_adapter(tmp_path / "adapter", qwen3, **settings)
    model = merged(qwen3, adapter, scale)
    expected = reference(qwen3, [spelled_out(qwen3, QUERY, text) for text in DOCUMENTS], model=model)
    reranker = load_planned(qwen3, template=PROMPT, adapter=adapter, **PLANS[plan])
    for _ in range(3):
        scores = reranker.score([(QUERY, text) for text in DOCUMENTS])
        assert scores == pytest.approx(expected, abs=TOLERANCE)
    assert expected != pytest.approx(load(qwen3, template=PROMPT).score([(QUERY, text) for text in DOCUMENTS]))


def test_an_adapter_of_another_model_is_refused(qwen3: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", qwen3)
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.2.mlp.up_proj.lora_A.weight"
    save_file(tensors | {name: torch.zeros(4, 33)}, path)
    with pytest.raises(UnsupportedModelError, match=r"made for another model.*layers\.2\.mlp\.up_proj"):
        load(qwen3, template=PROMPT, adapter=adapter)
    deeper = {key.replace("layers.2", "layers.9"): tensor for key, tensor in tensors.items()}
    save_file(deeper, path)
    with pytest.raises(UnsupportedModelError, match=r"layers\.9.*is not in this model"):
        load(qwen3, template=PROMPT, adapter=adapter)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelNotFoundError, match="adapter_model"):
        load(qwen3, template=PROMPT, adapter=adapter)


@pytest.mark.parametrize("settings", [{"peft_type": "IA3"}, {"use_dora": True}, {"alpha_pattern": {"q_proj": 3}}])
def test_other_adapters_are_refused(qwen3: Path, tmp_path: Path, settings: dict) -> None:
    adapter = save_adapter(tmp_path / "adapter", qwen3, **settings)
    with pytest.raises(UnsupportedModelError, match="merge_and_unload"):
        load(qwen3, template=PROMPT, adapter=adapter)


def test_no_adapter_there(qwen3: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"adapter_config\.json"):
        load(qwen3, adapter=tmp_path)


# Bad input


def test_a_model_without_the_answers_is_told_so(qwen3: Path) -> None:
    for yes in ("yes", "w1 w2", ""):
        prompt = Prompt(pieces=("{query} {document}",), yes=yes, no="w4")
        with pytest.raises(UnsupportedModelError, match=r"answer .*template=Prompt"):
            load(qwen3, template=prompt)


@pytest.mark.parametrize("pieces", [(), ("{query}",), ("{document}",), ("{query}{document}", "{document}")])
def test_a_prompt_needs_its_slots(pieces: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"\{document\} exactly once"):
        Prompt(pieces=pieces)


def test_a_window_smaller_than_the_template(qwen3: Path) -> None:
    with pytest.raises(ValueError, match=r"max_length=12 is too small: the template alone has 12 tokens"):
        load(qwen3, template=PROMPT, max_length=12)


def test_a_query_that_leaves_no_room(qwen3: Path) -> None:
    reranker = load(qwen3, template=PROMPT)
    with pytest.raises(ValueError, match="query has 90 tokens"):
        reranker.rerank(" ".join(WORDS[:90]), ["w1"])
    assert len(reranker.rerank("w1", ["w2"]).ranking) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "qwen4"}, r"template='qwen4' is not known; use one of qwen3-reranker"),
        ({"template": Prompt(("{query}{document}",), "w3", "w4"), "instruction": "x"}, "no slot"),
        ({"long_documents": "split"}, "long_documents='split'"),
    ],
)
def test_settings_that_make_no_sense(qwen3: Path, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(qwen3, **settings)


@pytest.mark.parametrize("settings", [{"instruction": "x"}, {"template": PROMPT}, {"template": "qwen3-reranker"}])
def test_an_encoder_takes_no_question(tiny_bert: Path, settings: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))}="):
        load(tiny_bert, **settings)


def test_a_tokenizer_of_another_model(qwen3: Path, tmp_path: Path) -> None:
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES | {"vocab_size": 5}, **DECODER))
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path, types=False)
    with pytest.raises(ModelNotFoundError, match="has 5 rows"):
        load(tmp_path, template=PROMPT)


def test_decoders_that_are_none(tmp_path: Path) -> None:
    Gemma2Config(
        **SIZES, **DECODER, use_bidirectional_attention=True, architectures=["Gemma2ForCausalLM"]
    ).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="use_bidirectional_attention"):
        load(tmp_path)


def test_one_model_is_loaded_while_another_works(qwen3: Path, decoder: Path) -> None:
    """What a loading thread does with modules is for that thread alone."""
    working = load_planned(qwen3, template=PROMPT, resident=())
    expected = working.score([(QUERY, "w50 w51")])
    with ThreadPoolExecutor(2) as threads:
        loading = threads.submit(lambda: [load(decoder, template=PROMPT) for _ in range(10)])
        while not loading.done():
            assert working.score([(QUERY, "w50 w51")]) == expected
        loading.result()
