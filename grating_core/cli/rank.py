"""``grating rerank`` and ``grating explain``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from grating_core.cli.inputs import Record, read_records
from grating_core.cli.options import (
    BUNDLED,
    AsJson,
    Input,
    InputOptions,
    Output,
    Query,
    Takes,
    TopK,
    in_panel,
    replaceable,
)
from grating_core.cli.output import err, show, tell, write_json, write_json_lines
from grating_core.cli.tables import closing_line, ranking_table, trace_table
from grating_core.settings import RerankSettings

if TYPE_CHECKING:
    from grating_core.results import RerankResult

Settings = Annotated[RerankSettings, Takes(model=BUNDLED)]


@dataclass(frozen=True, kw_only=True)
class RecordOptions(InputOptions):
    """How documents are read that come back with all that they were stored with."""

    id_field: Annotated[
        str | None,
        in_panel["input"](
            help="The JSON field or CSV column that names a document. The default is id, if there is one."
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class WantedOptions:
    """What a ranking is to hold."""

    top_k: TopK = 5
    score_threshold: Annotated[
        float | None,
        typer.Option(
            help="The score below which documents are left out: a raw logit such as 0.0, no probability."
        ),
    ] = None
    scores: Annotated[
        Literal["exact", "estimated"],
        in_panel["pruning"](
            help="Whether sure winners go through every layer ('exact') or stop early as well ('estimated')."
        ),
    ] = "exact"

    def __post_init__(self) -> None:
        if self.score_threshold is not None and not isfinite(self.score_threshold):
            raise ValueError(f"score_threshold={self.score_threshold} must be a finite number, such as 0.0")
        if self.score_threshold is not None and self.scores == "estimated":
            raise ValueError(
                f"score_threshold={self.score_threshold} needs --scores exact: estimates only compare with each "
                f"other"
            )


def rerank(
    query: Query,
    input: Input,
    how_stored: RecordOptions,
    settings: Settings,
    wanted: WantedOptions,
    format: Annotated[
        Literal["table", "json", "jsonl"],
        in_panel["output"](help="How the ranking is printed. 'jsonl' prints a line of JSON for each document."),
    ] = "table",
    as_json: AsJson = False,
    output: Output = None,
) -> None:
    """Print the documents that answer a question best."""
    ranked = _Ranked.of(query, input, how_stored, settings, wanted)
    chosen = "json" if as_json else format
    if chosen == "json":
        write_json(ranked.summary(), output)
    elif chosen == "jsonl":
        write_json_lines(ranked.entries(), output)
    elif output is not None:
        show(ranked.table(), closing_line(ranked.result), path=output)
    else:
        show(ranked.table())
        show(closing_line(ranked.result), style="dim")


def explain(
    query: Query,
    input: Input,
    how_stored: RecordOptions,
    settings: Settings,
    wanted: WantedOptions,
    plot: Annotated[
        Path | None,
        in_panel["output"](help="The picture to draw the scores by layer into.", callback=replaceable),
    ] = None,
    format: Annotated[Literal["table", "json"], in_panel["output"](help="How the ranking is printed.")] = "table",
    as_json: AsJson = False,
    output: Output = None,
) -> None:
    """Like rerank, and show layer by layer how the ranking came about."""
    ranked = _Ranked.of(query, input, how_stored, settings, wanted)
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
    """A ranking beside the records that its documents are of.

    Attributes:
        query: The question.
        records: Those that were ranked, by index.
        id_field: The field that names a record, if it has it.
        result: The ranking, without what scores below the threshold.
    """

    query: str
    records: Sequence[Record]
    id_field: str
    result: RerankResult

    @classmethod
    def of(
        cls,
        query: str,
        input: str,
        how_stored: RecordOptions,
        settings: RerankSettings,
        wanted: WantedOptions,
    ) -> _Ranked:
        """Read documents, rank them, and leave out what scores below a threshold."""
        records = read_records(input, **how_stored.reading)
        _check_ids(records, how_stored.id_field)
        if not records:
            tell("There are no documents.")
        with err.status("Loading ..."):
            from grating_core.reranker import Reranker

            with Reranker.open(settings) as reranker:
                texts = [record.text for record in records]
                result = reranker.rerank(query, texts, wanted.top_k, scores=wanted.scores)
        if wanted.score_threshold is not None:
            result = _above(result, wanted.score_threshold)
        return cls(query, records, how_stored.id_field or "id", result)

    def entries(self) -> list[dict[str, Any]]:
        """Each document of the ranking as JSON has it, best first; docs/cli.md describes it."""
        return [
            {"rank": rank, "id": self._id(ranked.index)}
            | asdict(ranked)
            | {"record": self.records[ranked.index].fields}
            for rank, ranked in enumerate(self.result.ranking, 1)
        ]

    def summary(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        return {"query": self.query, "ranking": self.entries(), **self.result.trace.summary()}

    def table(self) -> Any:
        """The ranking for people."""
        return ranking_table(self.result, [self._id(ranked.index) for ranked in self.result.ranking])

    def _id(self, index: int) -> Any:
        return (self.records[index].fields or {}).get(self.id_field)


def _check_ids(records: Sequence[Record], id_field: str | None) -> None:
    for number, record in enumerate(records):
        if id_field is not None and id_field not in (record.fields or {}):
            raise ValueError(f"document {number} (from 0) has no field {id_field!r}, which --id-field names")


def _above(result: RerankResult, threshold: float) -> RerankResult:
    from grating_core.results import RerankResult

    kept = [ranked for ranked in result.ranking if ranked.score >= threshold]
    if result.ranking and not kept:
        tell(
            f"No document scores {threshold:g} or more; the best has {result.ranking[0].score:.3f}. Scores are "
            f"raw logits: a probability p is a logit of log(p / (1 - p))."
        )
    return RerankResult(kept, result.trace)
