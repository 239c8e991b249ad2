"""Requests computed once and kept in files, so that lenses can be fitted to them again and again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from grating_core.engine.scorer import LayerScorer
from grating_core.lens.observations import Observations, Observer
from grating_core.requests import Request

DTYPE = np.float16  # the states of the bundled model are small


def observe_kept(scorer: LayerScorer, requests: Sequence[Request], directory: Path, name: str) -> Observations:
    """Compute the requests of a corpus, or read what was kept of them.

    Args:
        scorer: Computes them.
        requests: The requests.
        directory: Where the observations are kept. It must be emptied when the requests change.
        name: The name of the corpus.
    """
    shape = scorer.model.shape
    numbers = directory / f"{name}.npz"
    paths = [directory / f"{name}.{layer}.f16" for layer in range(shape.depth)]
    if not numbers.exists():
        directory.mkdir(parents=True, exist_ok=True)
        computed = Observations(expected=sum(len(one.documents) for one in requests), dtype=DTYPE)
        for request in tqdm(requests, name, unit="request"):
            observer = Observer(shape.depth, shape.pooling)
            computed.add(observer, *scorer.observe(request, observer))
        for layer, path in enumerate(paths):
            computed.layer(layer).tofile(path)
        sizes = [len(scores) for scores in computed.scores]
        scores, tokens = np.concatenate(computed.scores), np.concatenate(computed.tokens)
        np.savez(numbers, scores=scores, tokens=tokens, sizes=sizes)
    kept = np.load(numbers)
    ends = np.cumsum(kept["sizes"])[:-1]
    return Observations(
        np.split(kept["scores"], ends),
        np.split(kept["tokens"], ends),
        [path.open("r+b") for path in paths],
        expected=int(kept["sizes"].sum()),
        dtype=DTYPE,
    )
