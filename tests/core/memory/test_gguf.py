"""Headers of GGUF files: what is read, and what is refused in damaged ones."""

import random
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from grating_core.errors import FileError
from grating_core.memory.checkpoint import Checkpoint, read_gguf_header

Kind = gguf.GGMLQuantizationType
TABLE = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)


def write(path: Path, **changed: Any) -> Path:
    file = gguf.GGUFWriter(path, "llama")
    file.add_block_count(3)
    file.add_rope_freq_base(500.0)
    file.add_array("list.short", [1, 2, 3])
    file.add_array("list.long", list(range(2000)))
    file.add_array("texts.short", ["a", "é"])
    file.add_array("texts.long", [f"t{number}" for number in range(3000)])
    file.add_bool("yes", True)
    file.add_tensor("odd", np.arange(5, dtype=np.float32))
    file.add_tensor("table", gguf.quants.quantize(TABLE, Kind.Q8_0), raw_dtype=Kind.Q8_0)
    file.add_tensor("half", TABLE.astype(np.float16))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


def test_metadata_and_tensors_are_those_that_were_written(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf")
    metadata, tensors = read_gguf_header(path)
    assert metadata["general.architecture"] == "llama"
    assert metadata["llama.block_count"] == 3
    assert metadata["llama.rope.freq_base"] == 500.0
    assert (metadata["list.short"], metadata["list.long"]) == ([1, 2, 3], None)
    assert (metadata["texts.short"], metadata["texts.long"]) == (["a", "é"], None)
    assert metadata["yes"] is True
    assert {name: (tensor.kind, tensor.shape) for name, tensor in tensors.items()} == {
        "odd": ("F32", (5,)), "table": ("Q8_0", (6, 64)), "half": ("F16", (6, 64)),
    }  # fmt: skip
    reader = gguf.GGUFReader(path)
    assert {one.name: one.data_offset for one in reader.tensors} == {
        one.name: one.start for one in tensors.values()
    }
    buffer = torch.empty(5 * 4, dtype=torch.uint8)
    checkpoint = Checkpoint([path])
    checkpoint.read(tensors["odd"], tensors["odd"].start, buffer)
    assert buffer.view(torch.float32).tolist() == [0, 1, 2, 3, 4]
    checkpoint.close()


def test_a_type_that_is_not_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    file = gguf.GGUFWriter(path, "llama")
    file.add_tensor("small", np.zeros((2, 66), dtype=np.uint8), raw_dtype=Kind.IQ2_XXS)
    file.add_tensor("after", np.zeros(3, dtype=np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    assert read_gguf_header(path).tensors["small"].kind == "IQ2_XXS"
    data = path.read_bytes()
    place = data.index(b"small") + 5 + 4 + 2 * 8
    path.write_bytes(data[:place] + struct.pack("<I", 77) + data[place + 4 :])
    assert read_gguf_header(path).tensors["small"].kind == "type 77"


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (0, b"GGML", "does not begin with GGUF"),
        (4, struct.pack("<I", 1), "version 1, and grating reads 2 and 3"),
        (4, struct.pack(">I", 3), "highest byte"),
        (8, struct.pack("<Q", 2**60), "tensors, for which the file is too short"),
        (16, struct.pack("<Q", 2**60), "keys, for which the file is too short"),
        (24, struct.pack("<Q", 2**63), "bytes of a text"),
        (b"general.architecture", struct.pack("<I", 99), "type 99"),
        (b"list.short", struct.pack("<II", 9, 9), "list of type 9"),
        (b"list.long", struct.pack("<IIQ", 9, 5, 2**50), "entries of a list"),
        (b"texts.long", struct.pack("<IIQ", 9, 8, 2**50), "texts"),
        (b"table", struct.pack("<I", 9), "9 dimensions"),
        (b"table", struct.pack("<IQQ", 2, 64, 2**40), "the file, which may be cut short"),
        (b"table", struct.pack("<IQQ", 2, 64, 2**60), "shape"),
        (b"table", struct.pack("<IQQ", 2, 64, 0), "shape"),
        (b"table", struct.pack("<IQQ", 2, 30, 6), "no blocks of Q8_0"),
        (b"table", struct.pack("<IQQIQ", 2, 64, 6, 8, 33), "no multiple of 32"),
        (b"table", struct.pack("<IQQIQ", 2, 64, 6, 8, 0), "overlaps"),
        (b"table", struct.pack("<IQQIQ", 2, 64, 6, 8, 2**40), "the file, which may be cut short"),
    ],
)
def test_damage_is_named(tmp_path: Path, place: int | bytes, value: bytes, said: str) -> None:
    path = write(tmp_path / "model.gguf")
    data = path.read_bytes()
    start = place if isinstance(place, int) else data.index(place) + len(place)
    path.write_bytes(data[:start] + value + data[start + len(value) :])
    with pytest.raises(FileError, match=f"model.gguf is not GGUF.*{said}"):
        Checkpoint([path])


def test_any_damage_to_a_header_is_refused_or_harmless(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf")
    data, chance = path.read_bytes(), random.Random(3)
    end = min(tensor.start for tensor in read_gguf_header(path).tensors.values())
    size = len(data)
    for number in range(300):
        start = chance.randrange(end)
        cut = data[:start] if number % 3 == 0 else data[:start] + chance.randbytes(4) + data[start + 4 :]
        path.write_bytes(cut)
        try:
            found = read_gguf_header(path).tensors.values()
        except FileError:
            continue
        assert all(0 < tensor.start <= tensor.end <= size for tensor in found)


def test_a_file_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf")
    data = path.read_bytes()
    for length in (0, 3, 10, 100, len(data) // 2, len(data) - 40):
        path.write_bytes(data[:length])
        with pytest.raises(FileError, match="not GGUF"):
            read_gguf_header(path)
