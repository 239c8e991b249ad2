"""These are the commands ``grating rerank`` and ``grating explain``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from grating_core.arguments import check_deadline, check_threshold
from grating_core.cli.inputs import Record, read_records
from grating_core.cli.options import BUNDLED, InputOptions, Takes
from grating_core.cli.output import err, show, tell, write_json, write_json_lines
from grating_core.cli.tables import closing_line, ranking_table, trace_table
from grating_core.settings import RerankSettings

if TYPE_CHECKING:
    from rich.table import Table

    from grating_core.results import RerankResult

Settings = Annotated[RerankSettings, Takes(model=BUNDLED)]


@dataclass(frozen=True, kw_only=True)
class AskedOptions(InputOptions):
    """These options say what is asked, and of which documents; those come back with all they were stored with.

    Attributes:
        id_field: The JSON field or CSV column that names a document. The default is id, if there is one.
    """

    query: str
    input: str
    id_field: str | None = None


@dataclass(frozen=True, kw_only=True)
class WantedOptions:
    """These options say what a ranking is to hold.

    Attributes:
        score_threshold: The probability, from 0 to 1, below which documents are left out.
        raw_scores: Take the threshold as a raw logit, such as -3.5, and no probability.
        scores: Whether sure winners go through every layer ('exact') or stop early as well ('estimated').
        highlights: Show which sentences carried the scores: in colour, or in JSON by place and worth.
        deadline: The seconds for ranking, without loading. When they are over, the best ranking so far is printed.
    """

    top_k: int = 5
    score_threshold: float | None = None
    raw_scores: bool = False
    scores: Literal["exact", "estimated"] = "exact"
    deadline: float | None = None
    highlights: bool = False

    def __post_init__(self) -> None:
        check_deadline(self.deadline)
        check_threshold(self.score_threshold, raw_scores=self.raw_scores, scores=self.scores)


def rerank(
    asked: AskedOptions,
    settings: Settings,
    wanted: WantedOptions,
    format: Literal["table", "json", "jsonl"] = "table",
    as_json: bool = False,
    output: Path | None = None,
) -> None:
    """Print the documents that answer a question best.

    Args:
        format: How the ranking is printed. 'jsonl' prints a line of JSON for each document.
    """
    ranked = _ranked(asked, settings, wanted)
    if as_json or format == "json":
        write_json(ranked.summary(), output)
    elif format == "jsonl":
        write_json_lines(ranked.entries(), output)
    elif output is not None:
        show(ranked.table(), closing_line(ranked.result), path=output)
    else:
        show(ranked.table())
        show(closing_line(ranked.result), style="dim")


def explain(
    asked: AskedOptions,
    settings: Settings,
    wanted: WantedOptions,
    plot: Path | None = None,
    format: Literal["table", "json"] = "table",
    as_json: bool = False,
    output: Path | None = None,
) -> None:
    """Print the same as rerank, and layer by layer how the ranking came about.

    Args:
        plot: The picture to draw the scores by layer into.
        format: How the ranking is printed.
    """
    ranked = _ranked(asked, settings, wanted)
    trace = ranked.result.trace
    if plot is not None and trace.layers:
        from grating_core.lab.plots import plot_trajectories

        plot_trajectories(ranked.result, plot)
    if as_json or format == "json":
        write_json(ranked.summary() | {"layers": [asdict(layer) for layer in trace.layers]}, output)
    else:
        show(ranked.table(), trace_table(ranked.result), closing_line(ranked.result), path=output)


@dataclass(frozen=True)
class _Ranked:
    """This is a ranking beside the records that its documents are of, and the field that names a record."""

    query: str
    records: Sequence[Record]
    id_field: str
    result: RerankResult

    def entries(self) -> list[dict[str, Any]]:
        """Return each document of the ranking as JSON has it, best first; docs/cli.md describes it."""
        return [
            {"rank": rank, "id": self._id(ranked.index)}
            | asdict(ranked)
            | {"record": self.records[ranked.index].fields}
            for rank, ranked in enumerate(self.result.ranking, 1)
        ]

    def summary(self) -> dict[str, Any]:
        """Return all of it as JSON has it."""
        return {"query": self.query, "ranking": self.entries(), **self.result.trace.summary()}

    def table(self) -> Table:
        """Return the ranking for people."""
        return ranking_table(self.result, [self._id(ranked.index) for ranked in self.result.ranking])

    def _id(self, index: int) -> Any:
        return (self.records[index].fields or {}).get(self.id_field)


def _ranked(asked: AskedOptions, settings: RerankSettings, wanted: WantedOptions) -> _Ranked:
    """Read documents and rank them."""
    records = read_records(asked.input, format=asked.input_format, field=asked.field)
    for number, record in enumerate(records):
        if asked.id_field is not None and asked.id_field not in (record.fields or {}):
            raise ValueError(f"document {number} (from 0) has no field {asked.id_field!r}, which --id-field names")
    if not records:
        tell("There are no documents.")
    with err.status("Loading ..."):
        from grating_core.reranker import Reranker

        with Reranker.open(settings) as reranker:
            result = reranker.rerank(asked.query, [record.text for record in records], **asdict(wanted))
            if result.trace.layers and not result.ranking:
                best = max(result.trace.layers[-1].scores, default=0.0)
                tell(
                    f"No document reaches the threshold of {wanted.score_threshold:g}; the best has a score of "
                    f"{best:.3f}, a probability of {reranker.probability(best):.3g}."
                )
    return _Ranked(asked.query, records, asked.id_field or "id", result)
