"""Packing, slicing and selecting, for any requests, lengths, windows and shared tokens."""

from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grating_core.engine.ragged import Piece, RaggedBatch, common_prefix, filled
from grating_core.layers.sending import numbers_of
from grating_core.text.pairs import TokenisedPair

Sequences = list[list[list[int]]]  # of one request: the token ids of each window of each candidate
# The windows of each candidate of each request, by their lengths.
REQUESTS = st.lists(
    st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=3), min_size=1, max_size=8), min_size=1, max_size=4
)
PREFIXES = st.sampled_from([0, 1, 8, 20, 60])


def sequences_of(requests: list[list[list[int]]], prefix: int = 0) -> list[Sequences]:
    """Token ids that are all different, so that none can be mistaken for another; but for a prefix of 1000s."""
    lengths = [length for candidates in requests for windows in candidates for length in windows]
    starts = iter(accumulate(lengths, initial=0))
    shared = list(range(1000, 1000 + prefix))
    return [
        [
            [[*shared, *range(start := next(starts), start + length)] for length in windows]
            for windows in candidates
        ]
        for candidates in requests
    ]


def pack(requests: list[Sequences], share_prefix: bool = False, mixed: bool = False) -> RaggedBatch:
    pairs = [
        [[TokenisedPair(ids, [-token for token in ids]) for ids in windows] for windows in candidates]
        for candidates in requests
    ]
    return RaggedBatch.pack(pairs, share_prefix=share_prefix, mixed=mixed)


def unpacked(batch: RaggedBatch) -> list[tuple[int, int, list[int], list[int]]]:
    """Request, candidate, token ids and positions of each sequence, shared tokens included."""
    found, shared = [], ([], [])
    lengths = [piece.length for piece in batch.pieces]
    parts = zip(batch.input_ids.split(lengths), batch.positions.split(lengths), strict=True)
    for piece, (ids, places) in zip(batch.pieces, parts, strict=True):
        if piece.candidate is None:
            shared = ids.tolist(), places.tolist()
            continue
        before = shared if piece.before else ([], [])
        assert len(before[0]) == piece.before
        found.append((piece.request, piece.candidate, before[0] + ids.tolist(), before[1] + places.tolist()))
    return found


def expected(requests: list[Sequences]) -> list[tuple[int, int, list[int], list[int]]]:
    return [
        (request, candidate, ids, list(range(len(ids))))
        for request, candidates in enumerate(requests)
        for candidate, windows in enumerate(candidates)
        for ids in windows
    ]


@given(REQUESTS, PREFIXES, st.booleans())
def test_packing_keeps_every_sequence(requests: list[list[list[int]]], prefix: int, share: bool) -> None:
    sequences = sequences_of(requests, prefix)
    batch = pack(sequences, share)
    assert unpacked(batch) == expected(sequences)
    assert batch.token_type_ids.tolist() == [-token for token in batch.input_ids.tolist()]
    assert batch.tokens == sum(piece.length for piece in batch.pieces) == batch.tokens_by_request.total()
    assert batch.longest == max(len(ids) for _, _, ids, _ in unpacked(batch))
    assert batch.input_ids.dtype == batch.token_type_ids.dtype == batch.positions.dtype == torch.int64
    shared = [piece.request for piece in batch.pieces if piece.candidate is None]
    several = [number for number, request in enumerate(requests) if sum(map(len, request)) > 1]
    assert shared == (several if share and prefix >= 8 else [])


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
    assert common_prefix(sequences) == prefix


@given(REQUESTS, PREFIXES, st.integers(1, 100))
def test_slices_take_every_token_once_through_each_step(
    requests: list[list[list[int]]], prefix: int, most: int
) -> None:
    batch = pack(sequences_of(requests, prefix), share_prefix=True)
    slices = batch.slices(most)
    everything = list(range(batch.tokens))
    for step in ("keys", "queries"):
        assert [token for part in slices if getattr(part, step) for token in everything[part.tokens]] == everything
    ends = list(accumulate(piece.length for piece in batch.pieces))
    pieces = {end - piece.length: piece for piece, end in zip(batch.pieces, ends, strict=True)}
    there = dict.fromkeys(pieces, 0)  # keys that are there, of each piece by its first token
    for part in slices:
        assert len(everything[part.tokens]) <= min(most, part.rows)
        assert part.changed == part.queries
        assert part.parts[-1].rows.stop == len(everything[part.tokens])
        for one in part.parts:
            first = part.tokens.start + one.rows.start - one.start
            assert pieces[first] == one.piece
            if part.keys:
                assert there[first] == one.start
                there[first] = one.stop
            if part.queries:  # nobody attends to keys that are not there yet
                assert there[first] == one.piece.length
        assert len({one.piece.request for one in part.parts}) == 1
    for part in slices:  # spans name all keys of a sequence: of the slice, or all that are kept
        for one, span in zip(part.asked, part.spans, strict=True):
            assert (span.rows, span.first) == (one.rows, one.piece.before + one.start)
            assert span.keys == one.piece.before + one.piece.length
            assert span.own == (one.rows if one.whole else slice(0, span.keys))
    assert batch.slices(most) is slices
    # A slice holds as many whole pieces of a request as this order allows.
    for part, following in pairwise(slices):
        whole = all(one.whole for one in (*part.parts, *following.parts))
        if whole and part.parts[0].piece.request == following.parts[0].piece.request:
            assert len(everything[part.tokens]) + following.parts[0].piece.length > most


@given(REQUESTS, st.integers(1, 400))
def test_requests_share_slices_as_a_whole_and_are_divided_as_they_would_be_alone(
    requests: list[list[list[int]]], most: int
) -> None:
    def divided(batch: RaggedBatch) -> list[list[tuple[int, int, int, int]]]:
        """What each slice has of each of its requests, and to where its output goes."""
        found = []
        for part in batch.slices(most):
            for _, own in part.asked_by_request or [(0, list(part.parts))]:
                found.append([(one.piece.candidate, one.length, one.start, part.keys) for one in own])
        return found

    sequences = sequences_of(requests)
    batch = pack(sequences, mixed=True)
    assert divided(batch) == [own for one in sequences for own in divided(pack([one]))]
    tokens = batch.tokens_by_request
    for part, following in pairwise(batch.slices(most)):
        first, second = part.parts[-1].piece.request, following.parts[0].piece.request
        if first != second and part.parts[-1].whole:  # there was no room for the whole request
            assert part.tokens.stop - part.tokens.start + tokens[second] > most
    assert pack(sequences, share_prefix=True, mixed=True).mixed is False


@given(REQUESTS, PREFIXES, st.integers(1, 100), st.sampled_from(["first", "last"]))
def test_only_the_tokens_that_the_head_reads_are_asked_for_at_the_end(
    requests: list[list[list[int]]], prefix: int, most: int, only: str
) -> None:
    batch = pack(sequences_of(requests, prefix), share_prefix=True)
    found = []
    for part in batch.slices(most, only):
        assert [one.rows for one in part.asked] == [slice(row, row + 1) for row in range(len(part.asked))]
        assert [(span.rows, span.first) for span in part.spans] == [
            (one.rows, one.piece.before + one.start) for one in part.asked
        ]
        found += [
            (one.piece, int(batch.input_ids[part.tokens.start + place]))
            for one, place in zip(part.asked, part.places, strict=True)
        ]
    ends = zip(batch.pieces, accumulate(piece.length for piece in batch.pieces), strict=True)
    places = [(p, end - (p.length if only == "first" else 1)) for p, end in ends if p.candidate is not None]
    assert found == [(piece, int(batch.input_ids[place])) for piece, place in places]


@given(REQUESTS, PREFIXES, st.data())
def test_selecting_is_packing_only_the_kept(
    requests: list[list[list[int]]], prefix: int, data: st.DataObject
) -> None:
    keep = {
        number: sorted(data.draw(st.sets(st.integers(0, len(candidates) - 1))))
        for number, candidates in enumerate(requests)
    }
    whole = pack(sequences_of(requests, prefix), share_prefix=True)
    selected, runs = whole.select(keep)
    index = numbers_of(runs)
    assert all(one.stop < following.start for one, following in pairwise(runs))
    assert unpacked(selected) == [one for one in unpacked(whole) if one[1] in keep[one[0]]]
    assert torch.equal(selected.input_ids, whole.input_ids[index])
    assert torch.equal(selected.token_type_ids, whole.token_type_ids[index])
    assert {piece.request for piece in selected.pieces} == {number for number, kept in keep.items() if kept}


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (1, ["k", "k", "q", "q", "k", "k", "k", "q", "q", "q", "kq"]),
        (2, ["kq", "k", "k", "q", "q", "kq"]),
        (3, ["kq", "kq", "kq"]),
        (5, ["kq", "kq"]),
        (6, ["kq"]),
    ],
)
def test_slices_of_an_example(most: int, expected: list[str]) -> None:
    batch = pack(sequences_of([[[2], [3], [1]]]))
    assert ["k" * part.keys + "q" * part.queries for part in batch.slices(most)] == expected


def test_parts_of_a_long_piece_are_even() -> None:
    batch = RaggedBatch(torch.zeros(10), torch.zeros(10), (Piece(0, 0, 10),))
    assert [part.tokens for part in batch.slices(4) if part.keys] == [slice(0, 3), slice(3, 6), slice(6, 10)]


@given(st.integers(1, 5000))
def test_rows_are_filled_to_few_numbers(rows: int) -> None:
    assert rows <= filled(rows) <= rows + 63
    assert filled(rows) % 16 == 0
    assert filled(filled(rows)) == filled(rows)
