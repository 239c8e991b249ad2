"""Unpruned latency of this checkout beside that of another commit, in one run.

    git worktree add ../before COMMIT
    .venv/bin/python -m benchmarks.before --before ../before

Both load the same models, each in a process of its own, and take turns on the same questions, so that a noisy
machine is noisy for both. A ratio is the median, over the rounds, of the seconds of this checkout divided by
those of the other in the same round; below 1 this checkout is faster. "Fastest" is the ratio of the fastest
rounds, which means most where other programs run. The bundled model and SmolLM2-135M-Instruct are real; ``m3``
has the shape of bge-reranker-v2-m3 and random weights. It takes about five minutes on two cores.
"""

# A process that measures imports this file, and must not have imported grating_core before it knows which one. So
# imports of it, and of files that import it, stand where they are used.

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.worker import Answer, Ask, Facts, Ready, System, loaded, take_turns

ROOT = Path(__file__).parent.parent
Kind = Literal["rerank", "generate"]
Question = tuple[str, list[str]]
"""A query with its candidates; or a prompt, without candidates."""

_NEW_TOKENS = 48
_THIS, _BEFORE = "this checkout", "before"


@dataclass(frozen=True)
class Case:
    """A case is one thing that both are asked for.

    Attributes:
        name: What the table calls it.
        model: See :func:`benchmarks.shapes.find_or_write`.
        kind: Whether candidates are reranked or a prompt is continued.
        candidates: Candidates of a query.
        tokens: Mean tokens of a candidate, or of the prompt.
        often: How many times as often as asked for it is timed, because it is short.
    """

    name: str
    model: str
    kind: Kind = "rerank"
    candidates: int = 0
    tokens: int = 0
    often: int = 1


CASES = (
    Case("bundled", "bundled:ms-marco-minilm-l12", candidates=20, tokens=100, often=3),
    Case("smollm2, generating", "smollm2-135m", "generate", tokens=200, often=2),
    Case("smollm2, reranking", "smollm2-135m", candidates=10, tokens=100, often=2),
    Case("m3", "m3", candidates=10, tokens=100),
)


def load(ready: Ready, *, checkout: Path, directory: Path, kind: Kind, dtype: str, asked: dict[str, Any]) -> Ask:
    """Load a model by the code of a checkout.

    Args:
        ready: See :class:`System`.
        checkout: The directory that holds ``grating_core``.
        directory: Directory of the model.
        kind: See :class:`Case`.
        dtype: The compute dtype.
        asked: Further settings.
    """
    sys.path.insert(0, str(checkout))
    import grating_core

    if Path(grating_core.__file__).parents[1] != checkout:
        raise RuntimeError(f"{grating_core.__file__} was imported, which is not in {checkout}")
    ready()
    settings = {"device": "cpu", "dtype": dtype, **asked}
    if kind == "generate":
        generator = grating_core.StreamedCausalLM.from_pretrained(directory, **settings)

        def generate(question: Question) -> Facts:
            found = generator.generate(question[0], max_new_tokens=_NEW_TOKENS, temperature=1.0, seed=0)
            return {"tokens": found.new_tokens, "text": found.text}

        return generate
    reranker = grating_core.Reranker.from_pretrained(directory, pruning="off", **settings)

    def rank(question: Question) -> Facts:
        result = reranker.rerank(*question, len(question[1]))
        return {"tokens": 1, "scores": {ranked.index: ranked.score for ranked in result.ranking}}

    return rank


def measure(case: Case, dtype: str, before: Path, rounds: int) -> dict[str, Any]:
    """Return the row of a case in one dtype."""
    from benchmarks.recipes import is_decoder
    from benchmarks.shapes import find_or_write, random_texts

    directory = find_or_write(case.model)
    reranks = is_decoder(directory) and case.kind == "rerank"
    settings = {
        "directory": directory,
        "kind": case.kind,
        "dtype": dtype,
        "asked": {"template": "qwen3-reranker", "max_length": 512} if reranks else {},
    }
    query = random_texts(directory, 1, 10 if case.candidates else case.tokens, seed=1)[0]
    question = (query, random_texts(directory, case.candidates, case.tokens, seed=2))
    systems = [
        System(name, load, {"checkout": checkout.resolve(), **settings})
        for name, checkout in ((_THIS, ROOT), (_BEFORE, before))
    ]
    with loaded(systems) as workers:
        answers = take_turns(workers, [question], rounds=rounds * case.often, title=f"{case.name}, {dtype}")
    return {"case": case.name, "dtype": dtype, **compare(answers[_THIS][0], answers[_BEFORE][0])}


def compare(these: Sequence[Answer], others: Sequence[Answer]) -> dict[str, Any]:
    """Return seconds, ratios and difference of the answers of both, by round; of a text, seconds of a token."""
    own, before = ([answer.seconds / answer.facts["tokens"] for answer in answers] for answers in (these, others))
    ratios = [one / other for one, other in zip(own, before, strict=True)]
    low, _, high = quantiles(ratios, n=4)
    return {
        "before_seconds": median(before),
        "seconds": median(own),
        "ratio": median(ratios),
        "ratio_low": low,
        "ratio_high": high,
        "ratio_of_fastest": min(own) / min(before),
        "difference": difference(these[0].facts, others[0].facts),
    }


def difference(one: Facts, other: Facts) -> float:
    """Return the largest difference between scores of both; for texts, 0 if they are equal, else 1."""
    if "text" in one:
        return float(one["text"] != other["text"])
    return float(max(abs(one["scores"][index] - other["scores"][index]) for index in one["scores"]))


def main(
    before: Annotated[Path, typer.Option(help="The checkout of the other commit.")],
    only: Annotated[str, typer.Option(help="Only cases with this in their name or dtype.")] = "",
    rounds: Annotated[int, typer.Option(help="How often the slowest case is timed.", min=2)] = 7,
    output: Annotated[Path | None, typer.Option(help="The directory that before.json goes to, if any.")] = None,
) -> None:
    """Measure, print a table, and write before.json if there is a directory for it."""
    if not (before / "grating_core").is_dir():
        raise typer.BadParameter(f"{before} is no checkout of grating. Make one: git worktree add {before} COMMIT")
    table = Table("case", "dtype", "before, ms", "now, ms", "ratio", "middle half", "fastest", "difference")
    rows = []
    for case in CASES:
        for dtype in ("float32", "bfloat16"):
            if only in f"{case.name}, {dtype}":
                row = measure(case, dtype, before, rounds)
                rows.append(row)
                table.add_row(
                    row["case"],
                    row["dtype"],
                    *(f"{1e3 * row[name]:.1f}" for name in ("before_seconds", "seconds")),
                    f"{row['ratio']:.3f}",
                    f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f}",
                    f"{row['ratio_of_fastest']:.3f}",
                    f"{row['difference']:.2g}",
                )
    Console(width=110).print(table)
    if output is not None:
        from benchmarks.report import write_result

        write_result(output, "before", rows, rounds=rounds, setting={"new_tokens": _NEW_TOKENS})


if __name__ == "__main__":
    typer.run(main)
