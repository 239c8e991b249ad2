"""Reading tensors together, against the safetensors library."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from grating_core.errors import FileError
from grating_core.memory.checkpoint import Checkpoint, aligned_buffer
from grating_core.memory.group import PIECE, TensorGroup


def save(directory: Path, dtypes: list[torch.dtype]) -> Path:
    torch.manual_seed(0)
    shapes = [(3,), (700, 901), (1,), (0, 4), (5, 7), (2, 1_100_000)]
    tensors = {f"t{n}": torch.randn(shapes[n % 6]).to(dtype) for n, dtype in enumerate(dtypes)}
    save_file(tensors, directory / "a.safetensors")
    return directory / "a.safetensors"


@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lasting", [True, False])
@pytest.mark.parametrize(
    "dtypes", [[torch.float32] * 6, [torch.bfloat16] * 6, [torch.float16, torch.float32, torch.bfloat16] * 2]
)
def test_a_group_reads_what_the_library_reads(tmp_path: Path, dtypes, lasting: bool, wanted: torch.dtype) -> None:
    path = save(tmp_path, dtypes)
    expected = load_file(path)
    checkpoint = Checkpoint([path], lasting=lasting)
    for names in (["t0"], ["t5", "t1"], sorted(expected)):
        group = TensorGroup(checkpoint, {n: checkpoint.tensors[n] for n in names}, dict.fromkeys(names, wanted))
        buffer = aligned_buffer(group.size)
        group.read(buffer, aligned_buffer(PIECE))
        for name, tensor in group.views(buffer).items():
            assert torch.equal(tensor, expected[name].to(wanted))


def test_tied_weights_are_one_tensor_in_memory(tmp_path: Path) -> None:
    checkpoint = Checkpoint([save(tmp_path, [torch.float32] * 2)])
    group = TensorGroup(
        checkpoint,
        {"one": checkpoint.tensors["t1"], "other": checkpoint.tensors["t1"]},
        {"one": torch.float32, "other": torch.float32},
    )
    buffer = aligned_buffer(group.size)
    group.read(buffer, buffer)
    views = group.views(buffer)
    assert torch.equal(views["one"], views["other"])
    assert views["one"].data_ptr() == views["other"].data_ptr()


def test_neighbours_are_read_in_one_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint([save(tmp_path, [torch.float32] * 6)])
    group = TensorGroup(checkpoint, checkpoint.tensors, dict.fromkeys(checkpoint.tensors, torch.float32))
    reads = []
    monkeypatch.setattr(checkpoint, "read", lambda tensor, *_, **__: reads.append(tensor.name))
    group.read(aligned_buffer(group.size), aligned_buffer(0))
    assert len(reads) == 1


def test_a_tensor_at_an_odd_byte(tmp_path: Path) -> None:
    """Nothing in the format promises that tensors lie at multiples of their size."""
    header = b'{"a":{"dtype":"F32","shape":[5],"data_offsets":[0,20]}}'
    header += b" " * ((3 - len(header)) % 8)
    values = torch.arange(5, dtype=torch.float32)
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + values.numpy().tobytes())
    checkpoint = Checkpoint([path], lasting=True)
    assert checkpoint.tensors["a"].start % 4 == 3
    group = TensorGroup(checkpoint, {"a": checkpoint.tensors["a"]}, {"a": torch.float32})
    buffer = aligned_buffer(group.size)
    group.read(buffer, aligned_buffer(PIECE))
    assert torch.equal(group.views(buffer)["a"], values)


@given(st.binary(max_size=200))
def test_no_bytes_are_taken_for_a_checkpoint(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("bytes") / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(FileError, match="not safetensors"):
        Checkpoint([path])
    path.write_bytes(len(data).to_bytes(8, "little") + data)
    with pytest.raises(FileError, match="not safetensors"):
        Checkpoint([path])
