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
    """Lengths of sequences, the most tokens of a chunk, and who goes on after each layer."""

    lengths: list[int]
    chunk_tokens: int
    kept: list[list[bool]]


@st.composite
def lives(draw) -> Life:
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=12))
    kept = draw(st.lists(st.lists(st.booleans(), min_size=12, max_size=12), max_size=4))
    return Life(lengths, draw(st.integers(1, 120)), kept)


@given(lives(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_disk_and_memory_keep_the_same(tmp_path_factory, life: Life, dtype: torch.dtype) -> None:
    pairs = [[TokenisedPair([0] * n, [0] * n)] for n in life.lengths]
    batch = RaggedBatch.pack(pairs, torch.device("cpu"), share_prefix=False)
    expected = torch.randn(batch.tokens, WIDTH).to(dtype)
    shape = (batch.tokens, WIDTH, dtype, torch.device("cpu"))
    rows = filled(max(life.chunk_tokens, *life.lengths))
    directory: Path = tmp_path_factory.mktemp("spill")
    with ExitStack() as stack:
        disk = stack.enter_context(HiddenOnDisk(*shape, rows=rows, directory=directory, meter=Meter()))
        states = [HiddenInMemory(*shape), disk]
        for hidden in states:
            for chunk, part in hidden.visit(list(batch.chunks(life.chunk_tokens)), read=False):
                assert part.shape == (1, chunk.rows, WIDTH)
                part[0, : sum(chunk.lengths)] = expected[chunk.tokens]
        for marks in life.kept:
            going_on = [i for i in range(len(batch)) if marks[i]] or [0]
            index = batch.token_index(going_on)
            expected, batch = expected[index] + 1, batch.select(going_on)
            for hidden in states:
                hidden.keep(index)
                for chunk, part in hidden.visit(list(batch.chunks(life.chunk_tokens))):
                    tokens = sum(chunk.lengths)
                    part[0, :tokens] += 1
                    assert torch.equal(part[0, :tokens], expected[chunk.tokens])
    assert list(directory.iterdir()) == []
