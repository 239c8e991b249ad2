"""Fit the rule by which a density becomes shares of inputs and products: see grating_core/columns/allocation.py.

    .venv/bin/python scripts/fit_allocation.py

Perplexity of SmolLM2-135M-Instruct on the Python language reference, which comes with Python, for each candidate
of the rule's two numbers; the mean over densities of its logarithm decides. Takes about 10 minutes on two cores.
"""

from __future__ import annotations

import sys
from math import exp, log
from pathlib import Path
from pydoc_data.topics import topics
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.shapes import find_or_write
from grating_core.columns import allocation
from grating_core.lab.decoders import load_decoder
from grating_core.lab.quality import cut_windows, evaluate

DENSITIES = (0.5, 0.67, 0.83)
INPUTS_ODDS = (1.0, 1.2, 1.3, 1.4, 1.6, 1.8)
FIRST_LAYER = (1.0, 1.35, 1.7)


def main() -> None:
    """Print the perplexities and the best."""
    model, tokenizer = load_decoder(find_or_write("smollm2-135m"))
    windows = cut_windows(tokenizer, "\n\n".join(topics.values()), 512, 8)
    depth = model.config.num_hidden_layers
    print(f"dense {evaluate(model, windows).perplexity:.2f}", flush=True)
    # Each number by itself: they hardly depend on each other.
    chosen = {"odds": allocation.INPUTS_ODDS, "first": allocation.FIRST_LAYER}
    for name, values in (("odds", INPUTS_ODDS), ("first", FIRST_LAYER)):
        found = {}
        for value in values:
            setting = chosen | {name: value}
            perplexities = [
                evaluate(
                    model, windows, shares=allocation.allocate(d, depth, setting["odds"], setting["first"])
                ).perplexity
                for d in DENSITIES
            ]
            found[value] = mean(map(log, perplexities))
            print(setting, [f"{p:.2f}" for p in perplexities], f"{exp(found[value]):.2f}", flush=True)
        chosen[name] = min(found, key=found.__getitem__)
    print(chosen)


if __name__ == "__main__":
    main()
