"""Make the lens of the bundled model, which comes with the package.

    .venv/bin/python scripts/make_bundled_lens.py --sources DIRECTORY --observations ANOTHER

It is fitted on texts that anybody may ship, of many kinds and lengths; :mod:`calibration_corpora` says which, and
what has to be in the directory of sources. No collection that it is measured on is among them. All requests are
computed twice, in bfloat16 and in 8 bits, which takes about half an hour on two cores, and 9 GB in the directory
of observations. What is there is not computed again, so that fitting anew takes minutes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).parents[1]))

from calibration_corpora import make_corpora, requests_of

from benchmarks.observed import observe_kept
from grating_core import Reranker
from grating_core.engine.observing import layered
from grating_core.lens.features import look_costs
from grating_core.lens.fit import fit
from grating_core.lens.observations import Observations
from grating_core.lens.quantized import compare

MODEL = "bundled:ms-marco-minilm-l12"
OUTPUT = Path(__file__).parents[1] / "grating_core" / "lens" / "packaged" / "ms-marco-minilm-l12"


def main(
    sources: Annotated[Path, typer.Option(help="Where the texts are, see calibration_corpora.py.")],
    observations: Annotated[Path, typer.Option(help="Where what was computed is kept.")],
) -> None:
    """Calibrate, and write the lens into the package."""
    requests = {name: requests_of(name, corpus) for name, corpus in make_corpora(sources).items()}
    observed: dict[str, list[Observations]] = {}
    for dtype in ("bfloat16", "int8"):
        with Reranker.from_pretrained(MODEL, device="cpu", dtype=dtype, pruning="off") as reranker:
            scorer = layered(reranker.scorer)
            identity, shape = reranker.identity, scorer.model.shape
            observed[dtype] = [
                observe_kept(scorer, some, observations / dtype, name) for name, some in requests.items()
            ]
    full, in_8_bits = observed["bfloat16"], observed["int8"]
    calibrated = fit(
        full,
        pooling=shape.pooling,
        fingerprint=identity,
        costs=look_costs(shape),
        top_k=5,
        target=0.98,
        quantized=compare(in_8_bits, full),
        show_progress=True,
    )
    calibrated.save(OUTPUT)
    print(calibrated.summary, calibrated.int8 and (calibrated.int8.agreement, calibrated.int8.recounts.agreement))


if __name__ == "__main__":
    typer.run(main)
