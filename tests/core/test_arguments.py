"""Texts and numbers in the forms in which other libraries hold them, and what is refused by type."""

from collections import UserDict, deque
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from accelerate.utils import convert_file_size_to_int
from hypothesis import given
from hypothesis import strategies as st

from grating_core import Reranker, StreamedCausalLM, select_context
from grating_core.arguments import check_density, parse_budget, parse_size
from tests.core.models.test_decoders import save_decoder
from tests.core.parity import load

TEXTS = ["w1 w2", "w3", "w4 w5 w6"]


class Series:
    """As pandas and polars have them: no sequence of Python's, but goes through its values."""

    def __init__(self, values: list[Any]) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> Any:
        return self.values[index]


class DataFrame:
    """As pandas has them: goes through the names of its columns."""

    columns = ("title", "text")

    def __iter__(self) -> Any:
        return iter(self.columns)


@pytest.fixture(scope="module")
def reranker(tiny_bert: Path) -> Reranker:
    return load(tiny_bert)


TAKEN = {
    "tuple": tuple(TEXTS), "generator": None, "array": np.array(TEXTS), "objects": np.array(TEXTS, dtype=object),
    "series": Series(TEXTS), "deque": deque(TEXTS), "values": dict(enumerate(TEXTS)).values(),
}  # fmt: skip


@pytest.mark.parametrize("kind", TAKEN)
def test_texts_are_taken_in_any_form_that_has_an_order(reranker: Reranker, kind: str) -> None:
    def some() -> Any:
        return iter(TEXTS) if kind == "generator" else TAKEN[kind]

    assert reranker.rerank("w1", some()).ranking == reranker.rerank("w1", TEXTS).ranking
    assert select_context("w1", some(), reranker=reranker, max_tokens=99, chunk_tokens=9) == select_context(
        "w1", TEXTS, reranker=reranker, max_tokens=99, chunk_tokens=9
    )


REFUSED = [
    ({"a": "w1"}, r"not a dict, whose keys would be taken; write list\({}\.values\(\)\)"),
    (UserDict(a="w1"), r"write list\({}\.values\(\)\)"),
    ({"w1", "w2"}, r"not a set, which has no order to count in; write sorted\({}\)"),
    (frozenset(["w1"]), "not a frozenset"),
    (DataFrame(), r"not a DataFrame, whose columns would be taken; write {}\['text'\]\.tolist\(\)"),
    (b"w1", "not a bytes"),
    (bytearray(b"w1"), "not a bytearray"),
    (7, "not a int"),
    (None, "not a NoneType"),
    (np.array("w1"), "not a ndarray"),
    ([SimpleNamespace(page_content="w1")], r"{}\[0\] is a SimpleNamespace"),
    (["w1", float("nan")], r"{}\[1\] is a float"),
    (np.array([["w1"]]), r"{}\[0\] is a ndarray"),
]


@pytest.mark.parametrize(("documents", "told"), REFUSED)
def test_what_is_no_list_of_texts_is_refused_by_type(reranker: Reranker, documents: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told.replace("{}", "documents")):
        reranker.rerank("w1", documents)
    with pytest.raises(ValueError, match=told.replace("{}", "text_or_documents")):
        select_context("w1", documents, reranker=reranker, max_tokens=9, chunk_tokens=9)
    if not isinstance(documents, dict | UserDict):  # of corpora
        with pytest.raises(ValueError, match=told.replace("{}", "documents")):
            reranker.calibrate(documents)
    if documents is not None and not isinstance(documents, dict | UserDict):
        with pytest.raises(ValueError, match=told.replace("{}", "queries")):
            reranker.calibrate(TEXTS * 20, documents)


def test_an_error_within_a_generator_is_the_callers(reranker: Reranker) -> None:
    def texts() -> Any:
        yield "w1"
        raise TypeError("mine")

    with pytest.raises(TypeError, match="mine"):
        reranker.rerank("w1", texts())


def test_pairs_are_taken_in_any_form_that_has_an_order(reranker: Reranker) -> None:
    pairs = [("w1", text) for text in TEXTS]
    expected = reranker.score(pairs)
    for taken in (
        zip(["w1"] * 3, TEXTS, strict=True),
        np.array(pairs),
        iter(pairs),
        [list(pair) for pair in pairs],
    ):
        assert reranker.score(taken) == expected
    assert reranker.score(np.array(pairs, dtype=object)) == expected


@pytest.mark.parametrize(
    ("pairs", "told"),
    [
        ({"w1": "w2"}, r"write list\(pairs\.items\(\)\)"),
        (DataFrame(), "not a DataFrame"),
        ({("w1", "w2")}, "not a set"),
        ("w1", "not a str"),
        ([{"w1", "w2"}], r"pairs\[0\]"),
        (np.array([["w1", "w2", "w3"]]), r"pairs\[0\]"),
        ([("w1", 3)], r"pairs\[0\]"),
    ],
)
def test_what_is_no_list_of_pairs_is_refused(reranker: Reranker, pairs: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        reranker.score(pairs)


@pytest.mark.parametrize(
    ("given", "bytes"),
    [("300MB", 300_000_000), ("300mb", 300_000_000), (" 1.5GiB ", 3 * 2**29), ("0.3 GB", 300_000_000),
     (123, 123), ("123", 123)],
)  # fmt: skip
def test_sizes_are_understood(given: str | int, bytes: int) -> None:
    assert parse_budget(given) == bytes


@pytest.mark.parametrize("given", ["", "much", "-1MB", "0MB", 0, -5, 1.5, True, None, "MB", [300]])
def test_senseless_sizes_are_refused(given: object) -> None:
    with pytest.raises(ValueError, match=r"memory_budget=.*such as '300MB'"):
        parse_budget(given)


UNITS = ["", "KB", "MB", "GB", "KiB", "mib", "giB", "TB", "B", "kbit"]
NUMBERS = st.one_of(
    st.integers(-3, 2**70).map(str), st.floats().map(repr), st.sampled_from(["1_000", "1e3", "x", ""])
)


@given(NUMBERS, st.sampled_from(["", " "]), st.sampled_from(UNITS))
def test_sizes_are_those_of_accelerate(number: str, space: str, unit: str) -> None:
    size = f"{number}{space}{unit}"
    try:
        expected = convert_file_size_to_int(size.upper())  # small letters would count bits
    except (ValueError, OverflowError):
        with pytest.raises(ValueError, match="not a size such as '300MB'"):
            parse_size(size)
    else:
        assert parse_size(size) == expected


def test_numbers_are_taken_of_any_type(reranker: Reranker, tiny_bert: Path) -> None:
    assert len(reranker.rerank("w1", TEXTS, top_k=np.int64(2)).ranking) == 2
    assert reranker.tail("w1 w2 w3", np.int32(1)) == "w3"
    wanted = select_context("w1", TEXTS, reranker=reranker, max_tokens=3, chunk_tokens=90)
    assert (
        select_context("w1", TEXTS, reranker=reranker, max_tokens=np.int64(3), chunk_tokens=np.int8(90)) == wanted
    )
    with Reranker.from_pretrained(tiny_bert, target=np.float32(0.9), max_length=np.int16(64)) as other:
        assert other.max_length == 64
    with Reranker.from_pretrained(tiny_bert, target=Fraction(9, 10), recalibrate=np.float64(0)) as other:
        assert len(other.rerank("w1", TEXTS, 1).ranking) == 1
    assert parse_budget(np.int64(10**9)) == 10**9


def test_none_is_as_if_it_were_not_given(tiny_bert: Path) -> None:
    names = ("device", "dtype", "memory_budget", "pruning", "target", "guarantee", "lens", "recalibrate",
             "max_length", "long_documents", "template", "instruction", "adapter",
             "revision", "token", "cache_dir", "local_files_only", "show_progress")  # fmt: skip
    nothing = dict.fromkeys(names)
    usual = Reranker.shared(tiny_bert)
    assert Reranker.shared(tiny_bert, **nothing) is usual
    with Reranker.from_pretrained(tiny_bert, **nothing) as reranker:
        assert reranker.rerank("w1", TEXTS).ranking == usual.rerank("w1", TEXTS).ranking


def test_the_same_for_generating(tmp_path: Path) -> None:
    directory = save_decoder(tmp_path, "llama")
    names = ("device", "dtype", "memory_budget", "mlp_density", "bits", "kv_bits", "max_length", "adapter")
    settings = dict.fromkeys(names)
    with StreamedCausalLM.from_pretrained(directory, **settings) as model:
        found = model.generate(
            "w1 w2", max_new_tokens=np.int64(3), temperature=np.float32(1), top_p=np.float32(0.9), seed=np.uint8(1)
        )
        assert (
            found.text
            == model.generate("w1 w2", max_new_tokens=3, temperature=1, top_p=float(np.float32(0.9)), seed=1).text
        )


@pytest.mark.parametrize("density", [0.2, 1, 1.0])
def test_a_density_is_given_back(density: float) -> None:
    assert check_density(density) == density
