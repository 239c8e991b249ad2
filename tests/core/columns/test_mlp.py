from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from grating_core.columns.cache import Caching, ColumnCache
from grating_core.columns.companion import KINDS, ColumnSizes, MlpWeights, write_columns
from grating_core.columns.disk import Disk
from grating_core.columns.fetching import Fetcher
from grating_core.columns.masks import Shares
from grating_core.columns.mlp import ColumnMlp, ColumnTable, unpacked_memory
from grating_core.columns.reading import ColumnFile
from grating_core.errors import FileError
from grating_core.kernels.columns import RowFormat, pack_columns, unpack_columns
from grating_core.lab.masked import MaskedMlp
from grating_core.lab.quality import CachedMlp
from grating_core.layers.spec import LayerSpec, Norm
from grating_core.memory.checkpoint import aligned_buffer
from grating_core.memory.meter import Meter

WIDTH, PRODUCTS = 48, 80
SIZES = ColumnSizes(depth=1, width=WIDTH, products=PRODUCTS, dtype=torch.float32)
SPEC = LayerSpec(
    width=WIDTH, heads=4, key_heads=4, head_size=12, inner=PRODUCTS, norm=Norm("rms", 1e-6), activation="silu",
    gated=True,
)  # fmt: skip
STAGING = 8 * 2 * 4096  # so little that columns arrive in several blocks


def dense_mlp(bias: bool) -> LlamaMLP:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=WIDTH, intermediate_size=PRODUCTS, num_attention_heads=4, mlp_bias=bias)
    return LlamaMLP(config).requires_grad_(False)


class Case:
    """A dense MLP, its companion file, and what computes from it.

    Columns that are quantised are also those of the dense MLP.
    """

    def __init__(
        self,
        directory: Path,
        share: float,
        shares: Shares,
        *,
        bias: bool = False,
        preference: float = 1.0,
        bits: int | None = None,
        cost: float = 0.0,
    ) -> None:
        self.dense = dense_mlp(bias)
        self.path = directory / "columns"
        sizes = replace(SIZES, bits=bits)
        chance = np.random.default_rng(0)
        weights = [self.dense.up_proj.weight, self.dense.gate_proj.weight, self.dense.down_proj.weight]
        write_columns(
            self.path,
            [MlpWeights(*weights, *(chance.permutation(SIZES.count(kind)) for kind in KINDS))],
            sizes,
            "mine",
        )
        up, gate, down = weights
        both = quantised(torch.cat((up, gate)), sizes.form("inputs"))
        up[:], gate[:] = both.chunk(2)
        down[:] = quantised(down, sizes.form("products"))
        self.file = ColumnFile(self.path, sizes, "mine")
        self.meter = Meter()
        self.fetcher, unpacked = Fetcher(self.file, aligned_buffer(STAGING), self.meter), unpacked_memory(sizes)
        self.caches = [ColumnCache(int(share * SIZES.count(kind)), preference, cost) for kind in KINDS]
        self.tables = [
            ColumnTable(self.fetcher, 1, kind, cache, unpacked, self.meter)
            for kind, cache in zip(KINDS, self.caches, strict=True)
        ]
        for table in self.tables:
            table.fill()
        self.biases = {
            name.replace("_proj", ""): weight for name, weight in self.dense.named_parameters() if "bias" in name
        }
        self.pruned = ColumnMlp(SPEC, *self.tables, shares)
        self.masked = MaskedMlp(self.dense, shares)

    def mlp(self, states: Tensor) -> Tensor:
        """What the columns give for states ``[T, D]``."""
        return self.pruned(states, self.biases)


def quantised(matrix: Tensor, form: RowFormat) -> Tensor:
    """A matrix with the columns that a table would have."""
    table = torch.from_numpy(pack_columns(matrix.T, form))
    found = torch.empty(matrix.shape[1], matrix.shape[0])
    unpack_columns(form, table.flatten(), form.row_bytes * np.arange(len(table)), found)
    return found.T


def hidden_states(tokens: int, seed: int = 1) -> Tensor:
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("shares", [Shares(0.5, 0.5), Shares(0.7, 0.2), Shares(1.0, 1.0), Shares(0.01, 0.01)])
@pytest.mark.parametrize("bias", [False, True])
def test_single_tokens_are_computed_as_the_masks_say(
    tmp_path: Path, share: float, shares: Shares, bias: bool
) -> None:
    case = Case(tmp_path, share, shares, bias=bias)
    for token in hidden_states(30).split(1):
        torch.testing.assert_close(case.mlp(token), case.masked(token), atol=1e-5, rtol=1e-5)
    if share == 1:
        assert case.meter.columns_read == WIDTH + PRODUCTS  # when it was filled
    case.file.close()


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_columns_that_a_long_read_passes_are_used_as_well(tmp_path: Path, share: float) -> None:
    case = Case(tmp_path, share, Shares(0.4, 0.4), cost=2.0)
    orders = [case.file.order(1, kind) for kind in KINDS]
    cached = CachedMlp(case.dense, Shares(0.4, 0.4), Caching(share), orders)
    cached.caches = case.caches
    for token in hidden_states(30).split(1):
        torch.testing.assert_close(case.mlp(token), cached(token), atol=1e-5, rtol=1e-5)
    case.file.close()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_quantised_columns_compute_what_they_stand_for(tmp_path: Path, share: float, bits: int) -> None:
    case = Case(tmp_path, share, Shares(0.6, 0.4), bits=bits)
    for token in hidden_states(20).split(1):
        torch.testing.assert_close(case.mlp(token), case.masked(token), atol=1e-4, rtol=1e-4)
    prompt = hidden_states(7, seed=2)
    torch.testing.assert_close(case.mlp(prompt), case.dense(prompt), atol=1e-4, rtol=1e-4)
    case.file.close()


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("tokens", [2, 17])
def test_a_prompt_is_computed_with_all_columns(tmp_path: Path, share: float, tokens: int) -> None:
    case = Case(tmp_path, share, Shares(0.3, 0.3), bias=True)
    hidden = hidden_states(tokens)
    torch.testing.assert_close(case.mlp(hidden), case.dense(hidden), atol=1e-5, rtol=1e-5)
    case.file.close()


def test_columns_in_memory_are_preferred_and_less_is_read(tmp_path: Path) -> None:
    read = {}
    for preference in (1.0, 0.2):
        (tmp_path / str(preference)).mkdir()
        case = Case(tmp_path / str(preference), 0.5, Shares(0.5, 0.5), preference=preference)
        before = case.meter.columns_read
        for token in hidden_states(60).split(1):
            assert case.mlp(token).isfinite().all()
        read[preference] = case.meter.columns_read - before
        assert case.meter.columns_wanted == 60 * (WIDTH + PRODUCTS) / 2
        case.file.close()
    assert read[0.2] < 0.7 * read[1.0]


def test_after_a_failed_read_it_still_computes_right(tmp_path: Path) -> None:
    case = Case(tmp_path, 0.4, Shares(0.5, 0.5))
    tokens = hidden_states(20).split(1)
    whole = case.path.read_bytes()
    for number, token in enumerate(tokens):
        if number % 4 == 1:
            case.path.write_bytes(whole[: len(whole) // 2])
            with pytest.raises(FileError):
                compute_all(case, hidden_states(40, seed=number))
            case.path.write_bytes(whole)
        torch.testing.assert_close(case.mlp(token), case.masked(token), atol=1e-5, rtol=1e-5)
    case.file.close()


def compute_all(case: Case, hidden: Tensor) -> None:
    for token in hidden.split(1):
        case.mlp(token)


@pytest.mark.parametrize("reach", [1, 1 << 26])
def test_columns_that_are_read_ahead_change_no_product(tmp_path: Path, reach: int) -> None:
    case = Case(tmp_path, 0.3, Shares(0.5, 0.5))
    case.file.disk = Disk(0, 0, reach)
    inputs, products = case.tables
    mlp = ColumnMlp(SPEC, inputs, products, Shares(0.5, 0.5), inputs)  # the layer is its own next one
    read = []
    for token in hidden_states(30).split(1):
        case.fetcher.drop()
        torch.testing.assert_close(mlp(token, {}), case.masked(token), atol=1e-5, rtol=1e-5)
        before = case.meter.bytes_read
        torch.testing.assert_close(mlp(token, {}), case.masked(token), atol=1e-5, rtol=1e-5)
        read.append(case.meter.bytes_read - before)
        near = token + 0.3 * hidden_states(1, seed=9)
        torch.testing.assert_close(mlp(near, {}), case.masked(near), atol=1e-5, rtol=1e-5)
    assert min(read) > 0
    case.file.close()
