"""Nobody waits for the device before a decision needs scores.

Tensors on torch's device "meta" have no values. So whatever waits for values fails there, and so does whatever
mixes tensors of the CPU with those of the device.
"""

from pathlib import Path

import pytest
import torch

from grating_core.engine.contest import Contest
from grating_core.engine.forward import forward
from grating_core.engine.ragged import RaggedBatch
from grating_core.layers import attention
from grating_core.layers.spec import LayerSpec
from grating_core.lens.pruning import Pruning
from grating_core.memory.hidden import HiddenInMemory
from grating_core.models.cross_encoder import StoredCrossEncoder
from grating_core.pruning import ClusterPolicy, Off, PruningPolicy
from grating_core.text.pairs import Segments, TokenisedPair
from tests.core.conftest import save_model
from tests.core.lens.test_features import random_lens

META = torch.device("meta")
LENGTHS = (20, 60, 12, 90)
PAIRS = [
    [TokenisedPair([*range(10), *[20 + number] * (length - 10)], [0] * length, Segments((1, 8), (9, length - 1)))]
    for number, length in enumerate(LENGTHS)
]


def layers_until_somebody_waits(directory: Path, pruning: Pruning, slice_tokens: int) -> int:
    """Compute requests with a model whose weights and states have no values, until somebody wants to know some."""
    model = StoredCrossEncoder(directory, device=META, dtype=torch.bfloat16).load(None)
    requests = [PAIRS, PAIRS[:3]]
    batch = RaggedBatch.pack(requests, share_prefix=model.spec.causal)
    hidden = HiddenInMemory(batch.tokens, model.width, model.dtype, META)
    contests = [Contest((1,) * len(request), pruning, 2, model.depth) for request in requests]
    started = 0
    layer = model.layer

    def counted(number: int) -> object:
        nonlocal started
        started = number
        return layer(number)

    model.layer = counted
    with pytest.raises(NotImplementedError, match="no data"):
        list(forward(model, batch, hidden, contests, slice_tokens=slice_tokens))
    return started


@pytest.mark.parametrize(
    ("family", "one_call"), [("bert", True), ("bert", False), ("modernbert-mean", True), ("llama", True)]
)
def test_without_decisions_only_the_last_scores_are_waited_for(
    family: str, one_call: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some sequences fit into a slice with others, and some do not fit into one."""
    if one_call:  # torch's own function for CUDA tells, without computing, whether it takes what it is given
        monkeypatch.setattr(attention, "serves", serves_16_bits)
    directory = save_model(tmp_path, family)
    shape = StoredCrossEncoder(directory, device=META, dtype=torch.bfloat16).shape
    for lens in (None, random_lens(shape.width, shape.pooling).to(META)):
        assert layers_until_somebody_waits(directory, Pruning(Off(), lens), 40) == shape.depth


def serves_16_bits(spec: LayerSpec, states: torch.Tensor) -> bool:
    return spec.softcap is None and states.dtype == torch.bfloat16


@pytest.mark.parametrize(("policy", "lens", "layer"), [(ClusterPolicy(), False, 1), (ClusterPolicy(), True, 0)])
def test_a_decision_waits_for_its_scores(tiny_bert: Path, policy: PruningPolicy, lens: bool, layer: int) -> None:
    shape = StoredCrossEncoder(tiny_bert, device=META, dtype=torch.bfloat16).shape
    pruning = Pruning(policy, random_lens(shape.width, shape.pooling).to(META) if lens else None)
    assert layers_until_somebody_waits(tiny_bert, pruning, 1000) == layer
