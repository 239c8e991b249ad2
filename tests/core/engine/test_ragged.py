"""Packing, chunking and selecting, for any lengths, windows and shared prefixes."""

from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grating_core.engine.ragged import RaggedBatch
from grating_core.text.pairs import TokenisedPair

CPU = torch.device("cpu")
# The windows of each candidate, by their lengths.
CANDIDATES = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=3), min_size=1, max_size=15)
PREFIXES = st.sampled_from([0, 1, 8, 20, 60])


def sequences_of(candidates: list[list[int]], prefix: int = 0) -> list[list[list[int]]]:
    """Token ids that are all different, so that none can be mistaken for another; but for a prefix of 1000s."""
    lengths = [length for windows in candidates for length in windows]
    starts = iter(accumulate(lengths, initial=0))
    shared = list(range(1000, 1000 + prefix))
    return [
        [[*shared, *range(start := next(starts), start + length)] for length in windows] for windows in candidates
    ]


def pack(candidates: list[list[list[int]]], share_prefix: bool = False) -> RaggedBatch:
    pairs = [[TokenisedPair(ids, [-token for token in ids]) for ids in windows] for windows in candidates]
    return RaggedBatch.pack(pairs, CPU, share_prefix=share_prefix)


@given(CANDIDATES)
def test_packing_joins_the_sequences(candidates: list[list[int]]) -> None:
    batch = pack(sequences_of(candidates))
    lengths = [length for windows in candidates for length in windows]
    assert len(batch) == len(candidates)
    assert batch.prefix == 0
    assert batch.lengths == tuple(lengths)
    assert batch.windows == tuple(map(len, candidates))
    assert batch.input_ids.tolist() == list(range(batch.tokens)) == [-t for t in batch.token_type_ids.tolist()]
    assert batch.positions().tolist() == [place for length in lengths for place in range(length)]
    assert batch.input_ids.dtype == batch.token_type_ids.dtype == batch.positions().dtype == torch.int64


@given(CANDIDATES, st.integers(8, 60))
def test_a_shared_prefix_comes_once(candidates: list[list[int]], prefix: int) -> None:
    sequences = sequences_of(candidates, prefix)
    batch, repeated = pack(sequences, share_prefix=True), pack(sequences)
    count = len(repeated.lengths)
    if count == 1:
        assert batch.prefix == 0
        return
    assert batch.prefix == prefix
    assert batch.tokens == repeated.tokens - (count - 1) * prefix
    assert batch.longest == max(prefix, *batch.lengths)
    # Prefix and own tokens together are the sequence, ids and positions alike.
    for values, expected in ((batch.input_ids, repeated.input_ids), (batch.positions(), repeated.positions())):
        shared, *own = values.split([prefix, *batch.lengths])
        assert [[*shared.tolist(), *part.tolist()] for part in own] == [
            part.tolist() for part in expected.split(list(repeated.lengths))
        ]


@pytest.mark.parametrize(
    ("sequences", "prefix"),
    [
        ([[5] * 20] * 3, 19),  # each keeps a token of its own
        ([[5] * 20, [5] * 12], 11),
        ([[5] * 20, [5]], 0),
        ([[5] * 7 + [1], [5] * 7 + [2]], 0),  # too short to pay
        ([[5] * 20], 0),
        ([[1] * 20, [2] * 20], 0),
        ([[3, 9] * 10, [3, 9] * 6 + [4] * 9, [3, 9] * 7], 12),
    ],
)
def test_what_counts_as_a_prefix(sequences: list[list[int]], prefix: int) -> None:
    assert pack([[ids] for ids in sequences], share_prefix=True).prefix == prefix


@given(CANDIDATES, PREFIXES, st.integers(1, 100))
def test_chunks_divide_the_batch_in_order(candidates: list[list[int]], prefix: int, max_tokens: int) -> None:
    batch = pack(sequences_of(candidates, prefix), share_prefix=True)
    chunks = list(batch.chunks(max_tokens))
    everything = list(range(batch.tokens))
    assert tuple(length for chunk in chunks for length in chunk.lengths) == batch.lengths
    assert [token for chunk in chunks for token in everything[chunk.tokens]] == everything
    assert [chunk.prefix for chunk in chunks] == [batch.prefix] + [0] * (len(chunks) - 1)
    for chunk in chunks:
        assert chunk.prefix + sum(chunk.lengths) == len(everything[chunk.tokens])
        assert len(everything[chunk.tokens]) <= max_tokens or len(chunk.lengths) + (chunk.prefix > 0) == 1
    # As few as this order allows: the first sequence of a chunk did not fit into the one before.
    for chunk, following in pairwise(chunks):
        assert chunk.prefix + sum(chunk.lengths) + following.lengths[0] > max_tokens


@given(CANDIDATES, PREFIXES, st.data())
def test_selecting_is_packing_only_the_kept(candidates: list[list[int]], prefix: int, data: st.DataObject) -> None:
    keep = sorted(data.draw(st.sets(st.integers(0, len(candidates) - 1), min_size=1)))
    sequences = sequences_of(candidates, prefix)
    whole = pack(sequences, share_prefix=True)
    selected, expected = whole.select(keep), pack([sequences[i] for i in keep])
    assert selected.windows == expected.windows
    assert tuple(length + selected.prefix for length in selected.lengths) == expected.lengths
    assert torch.equal(selected.input_ids, whole.input_ids[whole.token_index(keep)])
    assert torch.equal(selected.token_type_ids, -selected.input_ids)
    shared, *own = selected.input_ids.split([selected.prefix, *selected.lengths])
    parts = [torch.cat((shared, part)) for part in own]
    assert torch.equal(torch.cat(parts), expected.input_ids)


@pytest.mark.parametrize(("max_tokens", "expected"), [(1, [1, 1, 1]), (5, [2, 1]), (6, [2, 1]), (9, [3])])
def test_chunks_of_an_example(max_tokens: int, expected: list[int]) -> None:
    batch = pack(sequences_of([[2], [3], [4]]))
    assert [len(chunk.lengths) for chunk in batch.chunks(max_tokens)] == expected
