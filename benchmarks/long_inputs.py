"""What a document costs that is far longer than the window: time and peak memory beside one that just exceeds it.

Run from the repository's root: ``python -m benchmarks.long_inputs``. Prints a table. Time is the processor's, the
best of some calls. Peak memory is what the call takes beyond what was there before it, the text included in that;
Linux only.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from time import process_time

from grating_core import Reranker, select_context

Call = Callable[[str], object]

MODEL = "bundled:ms-marco-minilm-l12"
QUERY = "Which method is called when an attribute is not found?"
_MB = 1_000_000
_WORDS = " ".join(topics.values())
_JSON = "".join(f'{{"id":{n},"k{n % 97}":["{n * 7919 % 1013:x}",null,{n / 7:.3f}]}},' for n in range(3000))

KINDS: dict[str, Callable[[int], str]] = {
    "English": lambda size: _repeated(_WORDS, size),
    "minified JSON": lambda size: _repeated(_JSON, size),
    "Chinese, no spaces": lambda size: _repeated(
        "".join(random.Random(0).choices("天地玄黄宇宙洪荒", k=5000)), size
    ),
    "one letter": lambda size: "x" * size,
    "line breaks": lambda size: "a" + "\n" * size + "b",
}


def _repeated(text: str, size: int) -> str:
    return (text * (size // len(text) + 1))[:size]


def _peak(call: Call, text: str) -> float:
    """Megabytes of memory that a call takes beyond what was there, at most."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    call(text)
    return (_status("VmHWM") - before) / 1000


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def _measure(call: Call, text: str, repeats: int) -> tuple[float, float]:
    call(text)
    peak = _peak(call, text)
    seconds = []
    for _ in range(repeats):
        started = process_time()
        call(text)
        seconds.append(process_time() - started)
    return min(seconds), peak


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 16], help="megabytes of the long documents")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    print("| budget | what | text | size | ms | MB beyond before |\n|---|---|---|---|---|---|")
    sizes = [4000, *(_MB * size for size in arguments.sizes)]
    for budget in (None, "150MB"):
        with Reranker.from_pretrained(MODEL, memory_budget=budget) as reranker:
            for what, call in _calls(reranker).items():
                for kind, make in KINDS.items():
                    for size in sizes if budget is None or what == "rerank" else []:
                        _print(budget, what, kind, size, *_measure(call, make(size), arguments.repeats))
            for what, call in _growing(reranker).items() if budget is None else ():
                for kind, make in KINDS.items():
                    for size in (_MB // 4, _MB):
                        _print(budget, what, kind, size, *_measure(call, make(size), 1))


def _calls(reranker: Reranker) -> dict[str, Call]:
    """What throws most of a long text away."""
    return {
        "rerank": partial(_rerank, reranker),
        "score": partial(_score, reranker),
        "tail": reranker.tail,
    }


def _growing(reranker: Reranker) -> dict[str, Call]:
    """What needs all of it."""
    return {"count_tokens": reranker.count_tokens, "select_context": partial(_select, reranker)}


def _rerank(reranker: Reranker, text: str) -> object:
    return reranker.rerank(QUERY, [text] * 4, 2)


def _score(reranker: Reranker, text: str) -> object:
    return reranker.score([(QUERY, text)])


def _select(reranker: Reranker, text: str) -> object:
    return select_context(QUERY, text, reranker=reranker, max_tokens=200)


def _print(budget: str | None, what: str, kind: str, size: int, seconds: float, peak: float) -> None:
    print(f"| {budget} | {what} | {kind} | {size:,} | {1000 * seconds:.1f} | {peak:.1f} |", flush=True)


if __name__ == "__main__":
    main()
