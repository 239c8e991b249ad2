"""One token through layers of a decoder: the compiled kernel against the one in torch, at every level."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from grating_core.forking import computed
from grating_core.kernels import token_reference as reference
from grating_core.kernels.groups import grouped_weight, weight_with_zeros
from grating_core.kernels.operands import Norm, Weight
from grating_core.kernels.packing import packed_weight
from grating_core.kernels.token import Memories, Memory, Output, Stack, TokenLayer, token
from tests.core.forking import in_fork

pytestmark = pytest.mark.usefixtures("level")
WIDTH, INNER, HEADS, KEY_HEADS, VOCABULARY = 72, 150, 6, 2, 77
FORMATS: dict[str, object] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "8 bits": (8, False),
    "8 bits with minima": (8, True),
    "4 bits": (4, False),
    "4 bits with minima": (4, True),
    "4 bits with zeros": "zeros",
}
KEPT = [torch.float32, torch.bfloat16, torch.int8]


class Made:
    """Random layers, what they keep of a sequence, and an output."""

    def __init__(self, kind: object, *, size: int = 40, seed: int = 0) -> None:
        self._random, self._kind, self._size = torch.Generator().manual_seed(seed), kind, size

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._random)

    def norm(self, width: int, kind: str = "rms") -> Norm:
        bias = self.normal(width) * 0.1 if kind == "layer" else None
        return Norm(kind, 1e-6, 0.0, 1 + self.normal(width) * 0.1, bias)

    def weight(self, columns: int, inner: int, *, biased: bool = True) -> Weight:
        matrix = self.normal(columns, inner) / inner**0.5
        bias = self.normal(columns) * 0.1 if biased else None
        if isinstance(self._kind, tuple):
            bits, minima = self._kind
            return grouped_weight(matrix, bias, bits, minima=minima)
        if self._kind == "zeros":
            return weight_with_zeros(matrix, bias)
        return packed_weight(matrix, bias, self._kind)

    def layer(
        self, *, gated: bool = True, norms: Sequence[str] = ("input_norm", "mlp_norm"), **rules: object
    ) -> TokenLayer:
        own, shared = HEADS * self._size, KEY_HEADS * self._size
        shapes = {"query": (own, WIDTH), "key": (shared, WIDTH), "value": (shared, WIDTH), "output": (WIDTH, own)}
        shapes |= {"gate": (INNER, WIDTH)} if gated else {}
        shapes |= {"up": (INNER, WIDTH), "down": (WIDTH, INNER)}
        return TokenLayer(
            {role: self.weight(*shape, biased=role != "down") for role, shape in shapes.items()},
            {role: self.norm(self._size if role in ("query_norm", "key_norm") else WIDTH) for role in norms},
            HEADS,
            KEY_HEADS,
            self._size,
            **{"activation": "silu", "scaling": self._size**-0.5, **rules},
        )

    def memories(self, count: int, tokens: int, dtype: torch.dtype = torch.float32) -> Memories:
        shape = (tokens, KEY_HEADS, self._size)
        scales = (shape[:2],) * 2 if dtype == torch.int8 else ()
        return Memories(
            [Memory(*torch.zeros(2, *shape, dtype=dtype), *map(torch.zeros, scales)) for _ in range(count)]
        )


def copied(memories: Memories) -> Memories:
    return Memories([Memory(*(None if part is None else part.clone() for part in each)) for each in memories.each])


def walked(made: Made, stack: Stack, memories: Memories, output: Output, tokens: int, bound: float) -> None:
    """Put tokens through both kernels, which see the same keys and values: only one token's error counts."""
    size = stack.layers[0].head_size
    for place in range(tokens):
        angles = [(made.normal(size // 2), made.normal(size // 2)) for _ in range(2)]
        row, before = made.normal(WIDTH), copied(memories)
        expected = row.clone()
        logits = token(row, stack, memories, 0, place, angles, output)
        wanted = reference.token(expected, stack, before, 0, place, angles, output)
        torch.testing.assert_close(row, expected, atol=bound, rtol=0)
        torch.testing.assert_close(logits, wanted, atol=bound, rtol=0)
        for one, other in zip(memories.each, before.each, strict=True):
            for mine, theirs in zip(one, other, strict=True):
                if mine is not None:
                    # A number that lies between two others of the memory's dtype may become either.
                    torch.testing.assert_close(
                        mine.float(), theirs.float(), atol=bound + (mine.dtype == torch.int8), rtol=0.01
                    )


@pytest.mark.parametrize("kept", KEPT, ids=str)
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_what_the_reference_gives(kind: str, kept: torch.dtype) -> None:
    made = Made(FORMATS[kind])
    layers = [made.layer(angles=1), made.layer(angles=0, window=5, softcap=3.0, factor=0.5)]
    output = Output(made.norm(WIDTH), made.weight(VOCABULARY, WIDTH))
    # An entry of a row of 8 bits is rounded the other way where the sums before it differ in the last bits.
    bound = 1e-4 if kind in ("float32", "bfloat16") and kept == torch.float32 else 0.05
    walked(made, Stack(layers), made.memories(2, 20, kept), output, 20, bound)


RULES: list[dict[str, object]] = [
    {},
    {"gated": False, "activation": "gelu"},
    {"activation": "gelu_pytorch_tanh", "norms": ("input_norm", "attention_norm", "mlp_norm", "output_norm")},
    {"norms": ("input_norm", "query_norm", "key_norm", "mlp_norm"), "angles": 0},
    {"norms": (), "activation": "relu", "factor": 0.1},
    {"window": 1, "softcap": 2.0},
    {"window": 140, "angles": 1},
]


@pytest.mark.parametrize("size", [4, 32, 72])
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_every_kind_of_layer_gives_what_the_reference_gives(rules: dict[str, object], size: int) -> None:
    made = Made(torch.float32, size=size, seed=1)
    stack, memories = Stack([made.layer(**rules), made.layer(**rules)]), made.memories(2, 300)
    for memory in memories.each:
        memory.key.copy_(made.normal(300, KEY_HEADS, size))
        memory.value.copy_(made.normal(300, KEY_HEADS, size))
    for place in (0, 1, 127, 128, 200, 299):
        angles = [(made.normal(size // 2), made.normal(size // 2)) for _ in range(2)]
        row, before = made.normal(WIDTH), copied(memories)
        expected = row.clone()
        assert token(row, stack, memories, 0, place, angles) is None
        assert reference.token(expected, stack, before, 0, place, angles) is None
        torch.testing.assert_close(row, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_the_last_layer_may_lack_its_mlp(rules: dict[str, object]) -> None:
    made = Made(torch.float32, seed=3)
    whole, lacking = made.layer(**rules), made.layer(**rules)
    for role in ("gate", "up", "down"):
        lacking.products.pop(role, None)  # type: ignore[attr-defined]
    stack, memories = Stack([whole, lacking]), made.memories(2, 20)
    for place in range(20):
        angles = [(made.normal(20), made.normal(20)) for _ in range(2)]
        row, before = made.normal(WIDTH), copied(memories)
        expected, found, wanted = row.clone(), torch.full((WIDTH,), torch.nan), torch.full((WIDTH,), torch.nan)
        assert token(row, stack, memories, 0, place, angles, normed=found) is None
        assert reference.token(expected, stack, before, 0, place, angles, normed=wanted) is None
        torch.testing.assert_close(row, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_output_may_be_a_table(dtype: torch.dtype) -> None:
    made = Made(torch.float32)
    row, none, table = made.normal(WIDTH), made.memories(0, 0), made.normal(VOCABULARY, WIDTH).to(dtype)
    for norm in (None, made.norm(WIDTH), made.norm(WIDTH, "layer")):
        found = token(row.clone(), Stack([]), none, 0, 0, [], Output(norm, table))
        wanted = reference.token(row.clone(), Stack([]), none, 0, 0, [], Output(norm, table))
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def passed(kind: str, tokens: int = 40) -> Tensor:
    """What some tokens give, one behind the other."""
    made = Made(FORMATS[kind], seed=2)
    stack, memories = Stack([made.layer(), made.layer(window=30)]), made.memories(2, tokens)
    output, found = Output(None, made.weight(VOCABULARY, WIDTH)), []
    for place in range(tokens):
        row = made.normal(WIDTH)
        found += [token(row, stack, memories, 0, place, [], output), row]
    return torch.cat([one for one in found if one is not None])


@pytest.mark.parametrize("kind", ["float32", "4 bits"])
def test_the_number_of_threads_changes_no_bit(kind: str) -> None:
    found = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        found.append(passed(kind))
    assert all(torch.equal(found[0], one) for one in found)


def test_several_threads_may_call_at_once() -> None:
    torch.set_num_threads(3)
    expected, found = passed("8 bits"), []

    def call() -> None:
        torch.set_num_threads(3)  # each thread has a number of its own
        found.append(passed("8 bits"))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert len(found) == 4
    assert all(torch.equal(expected, one) for one in found)


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_not_finite_stays_so(kind: str) -> None:
    made = Made(FORMATS[kind])
    stack, memories = Stack([made.layer()]), made.memories(1, 2)
    for wrong in (torch.nan, torch.inf):
        row = made.normal(WIDTH)
        row[3] = wrong
        logits = token(row, stack, memories, 0, 0, [], Output(None, made.weight(VOCABULARY, WIDTH)))
        assert logits is not None
        assert logits.isnan().all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_computes_the_same() -> None:
    torch.set_num_threads(3)
    expected = passed("int8").tolist()
    assert in_fork(lambda: computed(passed, "int8").tolist()) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="the library of torch has another name")
def test_a_call_within_a_parallel_loop_of_torch_does_not_wait_for_others() -> None:
    torch.set_num_threads(2)
    expected, found = passed("int8"), []

    @ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    def call(begin: int, end: int, _: object) -> None:
        for _ in range(begin, end):
            torch.set_num_threads(2)
            found.append(passed("int8"))

    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    library.torch_parallel_for(*map(ctypes.c_int64, (0, 2, 1)), call, None)
    assert len(found) == 2
    assert all(torch.equal(expected, one) for one in found)
