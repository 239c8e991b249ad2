"""Packing, chunking and selecting, for any lengths."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grating_core.engine.ragged import RaggedBatch

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=30)


def sequences_of(lengths: list[int]) -> list[list[int]]:
    """Token ids that are all different, so that none can be mistaken for another."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [list(range(start, start + length)) for start, length in zip(starts, lengths, strict=True)]


def pack(sequences: list[list[int]]) -> RaggedBatch:
    return RaggedBatch.pack(sequences, [[-token for token in ids] for ids in sequences], CPU)


@given(LENGTHS)
def test_packing_joins_the_sequences(lengths: list[int]) -> None:
    batch = pack(sequences_of(lengths))
    assert len(batch) == len(lengths)
    assert batch.lengths == tuple(lengths)
    assert batch.input_ids.tolist() == list(range(batch.tokens)) == [-t for t in batch.token_type_ids.tolist()]
    assert batch.positions().tolist() == [place for length in lengths for place in range(length)]
    assert batch.input_ids.dtype == batch.token_type_ids.dtype == batch.positions().dtype == torch.int64


@given(LENGTHS, st.integers(1, 100))
def test_chunks_divide_the_batch_in_order(lengths: list[int], max_tokens: int) -> None:
    batch = pack(sequences_of(lengths))
    chunks = list(batch.chunks(max_tokens))
    everything = list(range(batch.tokens))
    assert [i for chunk in chunks for i in range(len(lengths))[chunk.sequences]] == list(range(len(lengths)))
    assert [token for chunk in chunks for token in everything[chunk.tokens]] == everything
    for chunk in chunks:
        assert chunk.lengths == batch.lengths[chunk.sequences]
        assert sum(chunk.lengths) == len(everything[chunk.tokens])
        assert sum(chunk.lengths) <= max_tokens or len(chunk.lengths) == 1
    # As few as this order allows: the first sequence of a chunk did not fit into the one before.
    for chunk, following in pairwise(chunks):
        assert sum(chunk.lengths) + following.lengths[0] > max_tokens


@given(LENGTHS, st.data())
def test_selecting_is_packing_only_the_kept(lengths: list[int], data: st.DataObject) -> None:
    keep = sorted(data.draw(st.sets(st.integers(0, len(lengths) - 1), min_size=1)))
    sequences = sequences_of(lengths)
    whole = pack(sequences)
    selected, expected = whole.select(keep), pack([sequences[i] for i in keep])
    assert selected.lengths == expected.lengths
    assert torch.equal(selected.input_ids, expected.input_ids)
    assert torch.equal(selected.token_type_ids, expected.token_type_ids)
    assert torch.equal(whole.input_ids[whole.token_index(keep)], expected.input_ids)


@pytest.mark.parametrize(("max_tokens", "expected"), [(1, [1, 1, 1]), (5, [2, 1]), (6, [2, 1]), (9, [3])])
def test_chunks_of_an_example(max_tokens: int, expected: list[int]) -> None:
    assert [len(chunk.lengths) for chunk in pack(sequences_of([2, 3, 4])).chunks(max_tokens)] == expected
