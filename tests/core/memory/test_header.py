"""Headers of safetensors files: what the format's own library refuses is refused, and repeated names besides."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from grating_core import ModelNotFoundError
from grating_core.errors import FileError
from grating_core.memory.checkpoint import Checkpoint
from tests.core.memory.conftest import load_planned
from tests.core.parity import load

Fields = dict[str, Any]


def write(path: Path, header: str | bytes, data: bytes = bytes(48)) -> Path:
    header = header.encode() if isinstance(header, str) else header
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def entry(begin: int, end: int, kind: str = "F32", shape: list[Any] | None = None) -> Fields:
    return {"dtype": kind, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def intact() -> Fields:
    return {
        "__metadata__": {"format": "pt"},
        "a": entry(0, 16),
        "b": entry(16, 24, "F16", [2, 2]),
        "c": entry(24, 48, shape=[3, 2]),
    }


def ours(path: Path) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    try:
        checkpoint = Checkpoint([path])
    except FileError:
        return None
    checkpoint.close()
    return {name: (tensor.kind, tensor.shape) for name, tensor in checkpoint.tensors.items()}


def theirs(path: Path) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    try:
        with safe_open(path, "numpy") as file:
            names = [(name, file.get_slice(name)) for name in file.keys()]  # noqa: SIM118 - it is no dictionary
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in names}
    except (SafetensorError, ValueError, OSError):
        return None


VALUES = [
    -1, 0, 1, 2, 4, 8, 15, 17, 24, 47, 48, 49, 2**31, 2**63, 2**64, 10**30, 1.0, 2.5, True, None, "4",
    "F32", "BF16", "I64", "F4", "nope", [], [4], [0], [2, 2], [0, 16], [16, 0], [16, 24],
    [2**40, 2**40], {}, {"dtype": "F32"},
]  # fmt: skip


def damaged(source: random.Random) -> str:
    """An intact header in which one to three things are another."""
    fields = intact()
    for _ in range(source.randint(1, 3)):
        name = source.choice([name for name in fields if name != "__metadata__"] or ["a"])
        where: Any = fields.setdefault(name, entry(0, 16))
        match source.randrange(6):
            case 0:
                fields[name] = source.choice(VALUES)
            case 1 if isinstance(where, dict) and where:
                where[source.choice(list(where))] = source.choice(VALUES)
            case 2 if (
                isinstance(where, dict) and isinstance(numbers := where.get("data_offsets"), list) and numbers
            ):
                numbers[source.randrange(len(numbers))] = source.choice(VALUES)
            case 3:
                fields[source.choice(["d", "lm_head.weight"])] = entry(
                    *source.choice([(0, 0), (48, 48), (16, 24), (8, 16)])
                )
            case 4:
                del fields[name]
            case 5:
                fields["__metadata__"] = source.choice([None, {}, {"a": 1}, {"a": "b"}, [], "text", 5])
    items = list(fields.items())
    source.shuffle(items)
    text = json.dumps(dict(items))
    if source.random() < 0.15:
        place = source.randrange(len(text))
        text = text[:place] + source.choice(["}", "{", ",", "[", '"', "9", "\\ud800", " "]) + text[place + 1 :]
    return text


def test_damaged_headers_are_judged_as_the_formats_library_does(tmp_path: Path) -> None:
    accepted = 0
    for seed in range(4000):
        text = damaged(random.Random(seed))
        path = write(tmp_path / "x.safetensors", text)
        expected = theirs(path)
        assert ours(path) == expected, (seed, text)
        accepted += expected is not None
    assert 100 < accepted < 2000  # both kinds were tried


@pytest.mark.parametrize(
    "kind", ["BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "I16", "U16", "F16", "BF16", "I32", "F32", "F64", "U64"]
)
def test_every_dtype_of_the_format_has_its_length(kind: str, tmp_path: Path) -> None:
    accepted = []
    for count in (1, 3, 6, 12, 24, 48, 96):
        for length in (3, 48):
            path = write(
                tmp_path / "x.safetensors", json.dumps({"a": entry(0, length, kind, [count])}), bytes(length)
            )
            assert ours(path) == theirs(path)
            accepted += [(count, length)] if ours(path) else []
    assert accepted


@pytest.mark.parametrize(
    "text",
    [
        pytest.param('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", id="nested"),
        pytest.param('{"a": {"dtype": "F32", "shape": [12], "data_offsets": [0, 48], "x": NaN}}', id="NaN"),
        pytest.param(json.dumps({"a": entry(0, 48, shape=[10**18] * 99_999)}),
                     id="a product of a million digits"),
        pytest.param(json.dumps({"a": entry(0, 48)}).encode("utf-16"), id="UTF-16"),
        pytest.param(b'{"\xff": {"dtype": "F32", "shape": [12], "data_offsets": [0, 48]}}', id="no UTF-8"),
        pytest.param("[]", id="a list"),
        pytest.param("", id="nothing"),
    ],
)  # fmt: skip
def test_texts_that_are_no_header(text: str | bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", text)
    assert theirs(path) is None
    assert ours(path) is None


@pytest.mark.parametrize("length", [0, 7, 48, 49, 10**6, 10**8 + 1, 2**63, 2**64 - 1])
def test_lengths_of_headers_that_cannot_be(length: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + json.dumps(intact()).encode())
    assert theirs(path) is None
    assert ours(path) is None


def test_a_repeated_name_is_refused(tmp_path: Path) -> None:
    """The format's library takes one of the two, although the format forbids them."""
    one, two = json.dumps(entry(0, 16)), json.dumps(entry(16, 48))
    for header in (
        f'{{"a": {one}, "a": {one}, "b": {two}}}',
        f'{{"a": {one}, "a": {two}}}',
        f'{{"a": {one}, "\\u0061": {one}, "b": {two}}}',
        '{"a": {"dtype": "F32", "shape": [12], "shape": [12], "data_offsets": [0, 48]}}',
    ):
        with pytest.raises(FileError, match="is there twice"):
            Checkpoint([write(tmp_path / "x.safetensors", header)])


def test_a_name_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("x", "y"):
        save_file({"same": torch.zeros(2), name: torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(FileError, match=r"same is both in .*x\.safetensors and in .*y\.safetensors"):
        Checkpoint([tmp_path / "x.safetensors", tmp_path / "y.safetensors"])


def moved(fields: Fields, name: str, by: int) -> None:
    fields[name]["data_offsets"] = [offset + by for offset in fields[name]["data_offsets"]]


def swapped(fields: Fields, one: str, other: str) -> None:
    fields[one]["data_offsets"] = fields[other]["data_offsets"]


@pytest.mark.parametrize("loads", [load, lambda directory: load_planned(directory, resident=())])
@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda fields: swapped(fields, *list(fields)[3:5]), "overlaps|bytes, which is not"),
        (lambda fields: moved(fields, list(fields)[3], 4), "overlaps|hole"),
        (lambda fields: moved(fields, list(fields)[3], -4), "overlaps|hole"),
        (lambda fields: fields.pop(list(fields)[3]), "hole"),
    ],
)
def test_a_model_with_such_a_header_is_refused(
    tiny_bert: Path, tmp_path: Path, damage: Callable[[Fields], None], told: str, loads: Callable[[Path], object]
) -> None:
    for source in tiny_bert.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    path = tmp_path / "model.safetensors"
    stored = path.read_bytes()
    begin = 8 + int.from_bytes(stored[:8], "little")
    fields = json.loads(stored[8:begin])
    damage(fields)
    write(path, json.dumps(fields), stored[begin:])
    with pytest.raises(ModelNotFoundError, match=f"safetensors.*({told})"):
        loads(tmp_path)
