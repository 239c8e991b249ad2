"""DeBERTa with its own tokenizer, and what its configuration says of distances."""

import random
from pathlib import Path

import pytest
import torch
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification, DebertaV2Tokenizer
from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

from grating_core.layers.relative import rows_of_distances
from grating_core.layers.spec import Relative
from tests.core.conftest import DEBERTA, SIZES, randomise
from tests.core.parity import TOLERANCE, load, padded_scores, random_text

SPECIALS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["people", "Berlin", "naïve", "東京", "a", "bat's", "well-known", "3,520"]


@pytest.mark.parametrize("types", [0, 2])
@pytest.mark.parametrize("settings", [{}, {"do_lower_case": True, "split_by_punct": True}], ids=["cased", "lower"])
def test_with_its_own_tokenizer_it_scores_as_transformers_does(
    tmp_path: Path, types: int, settings: dict[str, bool]
) -> None:
    pieces = [*SPECIALS, "▁", "▁pe", "ople", "▁B", "er", "lin", "ï", "'", *LETTERS, "[MASK]"]
    vocabulary = [(piece, -float(number % 7) if number > 3 else 0.0) for number, piece in enumerate(pieces)]
    tokenizer = DebertaV2Tokenizer(
        vocabulary, unk_id=3, model_max_length=DEBERTA["max_position_embeddings"], **settings
    )
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(types)
    sizes = SIZES | {"vocab_size": len(tokenizer), "pad_token_id": 0}
    model = DebertaV2ForSequenceClassification(DebertaV2Config(**sizes, **DEBERTA, type_vocab_size=types))
    randomise(model).save_pretrained(tmp_path)
    source = random.Random(types)
    pairs = [("How many people", random_text(length, source, WORDS)) for length in (0, 1, 3, 9, 14, 60)]
    expected = padded_scores(tmp_path, pairs)
    assert max(expected) - min(expected) > 100 * TOLERANCE
    assert load(tmp_path).score(pairs) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize(("buckets", "farthest"), [(256, 512), (8, 80), (9, 30), (2, 4), (-1, 50)])
@pytest.mark.parametrize("tokens", [1, 40, 700])
def test_a_distance_has_the_row_that_transformers_gives_it(buckets: int, farthest: int, tokens: int) -> None:
    states = torch.empty(1, tokens, 1)
    span = buckets if buckets > 0 else farthest
    expected = build_relative_position(states, states, bucket_size=buckets, max_position=farthest)[0]
    places = torch.arange(tokens)
    rows = rows_of_distances(Relative(span, buckets > 0, farthest, "key", None), tokens)
    assert torch.equal(rows[places[:, None] - places + tokens].long(), (expected + span).clamp(0, 2 * span - 1))
