"""Pictures say what they show."""

import re
from pathlib import Path

import pytest

from grating_core import RerankResult, Route, Trace
from grating_core.lab.plots import plot_trajectories
from grating_core.results import LayerTrace, RankedDocument

DEFERRED, DROPPED, SELECTED = Route.DEFERRED, Route.DROPPED, Route.SELECTED


def result(routes: list[tuple[Route, ...]], winners: dict[int, bool]) -> RerankResult:
    """A rerank of four candidates in two layers; winners by index, best first, with whether they are estimates."""
    layers, alive = [], (0, 1, 2, 3)
    for number, decided in enumerate(routes, 1):
        scores = tuple(float(-index - number) for index in alive)
        layers.append(LayerTrace(number, alive, decided, scores, tokens=len(alive), seconds=0.1))
        alive = tuple(index for index, route in zip(alive, decided, strict=True) if route is DEFERRED)
    ranking = [
        RankedDocument(index, -float(index), "text", 0.5, estimated) for index, estimated in winners.items()
    ]
    return RerankResult(ranking, Trace(tuple(layers), 2, (1, 1, 1, 1), (), 0.1, windows=(1, 1, 1, 1)))


TOP, ESTIMATED = "top 2, with the rank", "top 2, with the rank, by an estimate"
STOPPED, LOST = "stops being computed at the dot", "computed to the end, not in the top"
CASES = {
    "exact": (result([(DEFERRED, DEFERRED, DROPPED, DROPPED), (DEFERRED, DEFERRED)], {1: False, 0: False}),
              {TOP, STOPPED}),
    "unpruned": (result([(DEFERRED,) * 4, (DEFERRED,) * 4], {0: False, 1: False}), {TOP, LOST}),
    "estimated": (result([(SELECTED, DEFERRED, DEFERRED, DROPPED), (DEFERRED, DEFERRED)], {0: True, 1: False}),
                  {TOP, ESTIMATED, STOPPED, LOST}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_legend_has_what_is_drawn_and_winners_their_rank(case: str, tmp_path: Path) -> None:
    found, labels = CASES[case]
    plot_trajectories(found, tmp_path / "scores.svg")
    texts = re.findall(
        "<!-- (.*?) -->", (tmp_path / "scores.svg").read_text()
    )  # matplotlib writes texts as comments
    assert {text for text in texts if text in {TOP, ESTIMATED, STOPPED, LOST}} == labels
    title = next(place for place, text in enumerate(texts) if text.startswith("4 candidates, of which the top 2"))
    assert sorted(
        texts[texts.index("score, or the lens's estimate (differences in a layer count)") + 1 : title]
    ) == ["1", "2"]
