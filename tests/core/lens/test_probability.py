"""A raw score means a probability: by the logistic function, or by a mapping that was fitted to judgements."""

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest

from grating_core import Reranker
from grating_core.lens.probability import MANY, checked_judgements, find_probability, fit_probability, logistic

TRUE_LINE = (0.5, -2.0)  # slope and intercept of the logit by which the judgements below are made


@pytest.mark.parametrize(
    ("score", "probability"),
    [(0.0, 0.5), (math.log(3), 0.75), (-math.log(3), 0.25), (800.0, 1.0), (-800.0, 0.0), (-40.0, math.exp(-40))],
)
def test_the_logistic_function_of_any_score(score: float, probability: float) -> None:
    assert logistic(score) == pytest.approx(probability, rel=1e-12)


def judged(count: int, seed: int) -> tuple[list[float], list[bool]]:
    """Draw scores, and judgements with probabilities on the true line."""
    random = np.random.default_rng(seed)
    scores = random.uniform(-12, 12, count)
    slope, intercept = TRUE_LINE
    return scores.tolist(), (random.random(count) < 1 / (1 + np.exp(-slope * scores - intercept))).tolist()


@pytest.mark.parametrize(("count", "method"), [(300, "platt"), (MANY - 1, "platt"), (20 * MANY, "isotonic")])
def test_a_mapping_finds_the_true_probabilities_and_never_falls(count: int, method: str) -> None:
    fitted = fit_probability(*judged(count, seed=2))
    assert (fitted.method, fitted.pairs) == (method, count)
    grid = np.linspace(-30, 30, 400)
    found = np.array([fitted(score) for score in grid])
    assert np.all(np.diff(found) >= 0)
    assert np.all((found > 0) & (found < 1))
    inside = np.abs(grid) < 11
    slope, intercept = TRUE_LINE
    true = 1 / (1 + np.exp(-slope * grid[inside] - intercept))
    assert np.abs(found[inside] - true).max() < (0.15 if count < MANY else 0.08)


@pytest.mark.parametrize("count", [400, 4000])
def test_judgements_that_contradict_the_model_are_refused(count: int) -> None:
    scores, relevant = judged(count, seed=1)
    with pytest.raises(ValueError, match="higher scores are not more relevant"):
        fit_probability([-score for score in scores], relevant)


def test_what_is_no_judgement_is_named() -> None:
    good = [("q", "text", True)] * 10 + [("q", "other", 0)] * 10
    assert checked_judgements(iter(good)).relevant == [True] * 10 + [False] * 10
    assert sum(checked_judgements([*good, ("q", "text", np.int64(3)), ("q", "text", -1)]).relevant) == 11
    for wrong in ("abc", ("q", "text"), ("q", "text", "yes"), ("q", "text", float("nan")), ("q", "text", None), 3):
        with pytest.raises(ValueError, match=r"judgements\[20\]"):
            checked_judgements([*good, wrong])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="9 relevant texts and 10 others"):
        checked_judgements(good[1:])


@pytest.mark.parametrize("count", [200, 2000])
def test_a_mapping_is_kept_for_its_model_alone(
    count: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fitted = fit_probability(*judged(count, seed=2))
    fitted.save(tmp_path, "a model")
    assert find_probability(tmp_path, "a model") == fitted
    assert caplog.records == []
    assert find_probability(tmp_path, "another model") is logistic
    assert "for other weights" in caplog.text


def _cut(text: str) -> str:
    return text[: len(text) // 2]


def _changed(text: str) -> str:
    stored = json.loads(text)
    stored["fitted"]["logits"][0] -= 1
    return json.dumps(stored)


def _newer(text: str) -> str:
    return json.dumps(json.loads(text) | {"format": 2})


@pytest.mark.parametrize("damage", [_cut, _changed, _newer, lambda text: "[]", lambda text: "[" * 100_000])
def test_a_damaged_mapping_is_left_out_with_a_warning(
    damage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit_probability(*judged(200, seed=3)).save(tmp_path, "a model")
    path = tmp_path / "probabilities.json"
    path.write_text(damage(path.read_text()))
    with caplog.at_level(logging.WARNING):
        assert find_probability(tmp_path, "a model") is logistic
    assert str(path) in caplog.text


def test_a_reranker_learns_and_keeps_what_its_scores_mean(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRATING_CACHE", str(tmp_path))
    texts = [f"w{number} w{number % 7}" for number in range(60)]
    with Reranker.from_pretrained(tiny_bert, device="cpu", dtype="float32") as reranker:
        assert reranker.fitted_probability is None
        before = reranker.rerank("w1 w2", texts, 60).ranking
        bar = before[30].score
        judgements = [
            ("w1 w2", one.text, one.score > bar if place % 5 else place % 2) for place, one in enumerate(before)
        ]
        fitted = reranker.fit_probabilities(judgements)
        assert fitted.method == "platt"
        after = reranker.rerank("w1 w2", texts, 60).ranking
        assert [(one.index, one.score) for one in after] == [(one.index, one.score) for one in before]
        assert [one.probability for one in after] == [fitted(one.score) for one in after]
        assert [one.probability for one in after] != [one.probability for one in before]
        kept = reranker.rerank("w1 w2", texts, 60, score_threshold=after[20].probability).ranking
        assert kept == after[:21]
    with Reranker.from_pretrained(tiny_bert, device="cpu", dtype="float32", memory_budget="100MB") as again:
        assert again.fitted_probability == fitted
        assert again.probability(bar) == fitted(bar)
