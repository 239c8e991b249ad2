"""Hidden states on disk against hidden states in memory."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from grating_core.engine.ragged import RaggedBatch, filled
from grating_core.memory.hidden import HiddenInMemory, HiddenOnDisk
from grating_core.memory.meter import Meter
from grating_core.text.pairs import TokenisedPair

WIDTH = 6


@dataclass
class Life:
    """Lengths of sequences, the most tokens of a slice, and who goes on after each layer."""

    lengths: list[int]
    slice_tokens: int
    kept: list[list[bool]]


@st.composite
def lives(draw) -> Life:
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=12))
    kept = draw(st.lists(st.lists(st.booleans(), min_size=12, max_size=12), max_size=4))
    return Life(lengths, draw(st.integers(1, 120)), kept)


@given(lives(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_disk_and_memory_keep_the_same(tmp_path_factory, life: Life, dtype: torch.dtype) -> None:
    pairs = [[TokenisedPair([0] * n, [0] * n)] for n in life.lengths]
    batch = RaggedBatch.pack([pairs], share_prefix=False)
    expected = torch.randn(batch.tokens, WIDTH).to(dtype)
    shape = (batch.tokens, WIDTH, dtype, torch.device("cpu"))
    rows = filled(life.slice_tokens)
    directory: Path = tmp_path_factory.mktemp("spill")
    with ExitStack() as stack:
        disk = stack.enter_context(HiddenOnDisk(*shape, rows=rows, directory=directory, meter=Meter()))
        states = [HiddenInMemory(*shape), disk]
        for hidden in states:
            for part, found in hidden.visit(batch.slices(life.slice_tokens), read=False):
                assert found.shape == (part.rows, WIDTH)
                found[: part.tokens.stop - part.tokens.start] = expected[part.tokens]
        for marks in life.kept:
            alive = [piece.candidate for piece in batch.pieces]
            going_on = [candidate for candidate in alive if marks[candidate]] or alive[:1]
            batch, runs = batch.select({0: going_on})
            before = torch.cat([expected[run] for run in runs])
            expected = before + 1
            for hidden in states:
                hidden.keep(runs)
                for part, found in hidden.visit(batch.slices(life.slice_tokens)):
                    tokens = part.tokens.stop - part.tokens.start
                    if part.changed:
                        found[:tokens] += 1
                        assert torch.equal(found[:tokens], expected[part.tokens])
                    else:
                        assert torch.equal(found[:tokens], before[part.tokens])
    assert list(directory.iterdir()) == []
