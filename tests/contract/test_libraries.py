"""What we rely on in the libraries that the core is built with."""

import inspect
import json
import struct
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import typer
from huggingface_hub import HfApi, constants, scan_cache_dir, snapshot_download
from huggingface_hub.errors import CacheNotFound, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from platformdirs import user_cache_dir
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load, load_file, save
from semantic_text_splitter import TextSplitter
from sklearn.cluster import KMeans
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge
from threadpoolctl import threadpool_info, threadpool_limits
from typer.testing import CliRunner


def test_safetensors_are_laid_out_as_we_read_them(tmp_path: Path) -> None:
    """The headers are read here, not by the library: eight bytes of length, JSON, then the tensors."""
    data = save({"b": torch.ones(2, dtype=torch.bfloat16), "a": torch.arange(3.0)}, metadata={"format": "pt"})
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert header["__metadata__"] == {"format": "pt"}
    begin, end = header["a"]["data_offsets"]
    assert np.frombuffer(data[8 + length :][begin:end], "<f4").tolist() == [0, 1, 2]
    assert (header["a"]["dtype"], header["b"]["dtype"]) == ("F32", "BF16")
    assert load(data)["b"].dtype == torch.bfloat16
    save_arrays({"a": np.zeros(2, np.float32)}, tmp_path / "a.safetensors", metadata={"format": "pt"})
    assert load_file(tmp_path / "a.safetensors")["a"].tolist() == [0, 0]
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert list(file.keys()) == ["a"]
        assert file.metadata() == {"format": "pt"}
    with pytest.raises(SafetensorError):
        load(data[:-1])


def test_the_hub_is_asked_by_these_words(tmp_path: Path) -> None:
    words = {"revision", "token", "cache_dir", "local_files_only", "allow_patterns", "ignore_patterns"}
    assert words <= set(inspect.signature(snapshot_download).parameters)
    assert {"revision", "timeout"} <= set(inspect.signature(HfApi.model_info).parameters)
    assert constants.DEFAULT_REVISION == "main"
    assert issubclass(LocalEntryNotFoundError, Exception)
    assert issubclass(HfHubHTTPError, OSError)
    with pytest.raises(LocalEntryNotFoundError):
        snapshot_download("nobody/nothing", cache_dir=tmp_path, local_files_only=True)
    with pytest.raises(HFValidationError):
        snapshot_download("no/such/name", cache_dir=tmp_path, local_files_only=True)
    with pytest.raises(CacheNotFound):
        scan_cache_dir(tmp_path / "missing")
    assert constants.HF_HUB_CACHE
    assert constants.HF_HUB_OFFLINE in (True, False)


def test_scikit_learn_fits_what_pruning_and_calibration_ask_for() -> None:
    points = np.array([[0.0], [0.1], [5.0]])
    groups = KMeans(n_clusters=2, init=points[[0, 2]], n_init=1).fit(points, sample_weight=np.ones(3))
    assert groups.labels_.tolist() == [0, 0, 1]
    ridge = Ridge(alpha=1e-9, fit_intercept=False, solver="cholesky").fit(points, points)
    assert ridge.coef_ == pytest.approx(1.0)
    index = TfidfVectorizer(sublinear_tf=True).fit(["one two", "two three"])
    assert index.transform(["two"]).shape == (1, 3)


def test_the_splitter_counts_by_our_function_and_gives_places() -> None:
    splitter = TextSplitter.from_callback(lambda text: len(text.split()), 3)
    text = "One two three. Four five six."
    chunks = splitter.chunk_indices(text)
    assert [text[start : start + len(chunk)] for start, chunk in chunks] == [chunk for _, chunk in chunks]
    assert len(chunks) == 2


def test_threads_and_memory_can_be_asked_for() -> None:
    with threadpool_limits(1, user_api="openmp"):
        assert all(pool["num_threads"] == 1 for pool in threadpool_info() if pool["user_api"] == "openmp")
    assert psutil.Process().memory_info().rss > 0
    assert user_cache_dir("grating")


def test_commands_are_typed_functions_and_text_is_never_markup() -> None:
    app = typer.Typer()

    @app.command()
    def say(word: str, loud: bool = typer.Option(False, "--loud", help="Louder.")) -> None:
        typer.echo(word.upper() if loud else word)

    result = CliRunner().invoke(app, ["hello", "--loud"])
    assert (result.exit_code, result.stdout) == (0, "HELLO\n")
    console = Console(width=80, force_terminal=False)
    table = Table(box=None)
    table.add_column()
    table.add_row(Text("[demo]"))
    with console.capture() as captured:
        console.print(table)
    assert "[demo]" in captured.get()
