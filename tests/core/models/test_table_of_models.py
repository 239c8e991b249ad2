"""The table of models in docs/models.md: each row is built once, and does what the row says."""

import json
import re
from math import isfinite
from pathlib import Path
from typing import NamedTuple

import pytest

from grating_core import GratingError, Reranker
from grating_core.models.families import FAMILIES
from grating_core.text.prompts import PROMPTS, official_prompt
from tests.core.cli.conftest import grating
from tests.core.models.table_of_models import BUILDERS

PAGE = Path(__file__).parents[3] / "docs" / "models.md"


class Row(NamedTuple):
    models: str
    architectures: list[str]
    works: str
    checked: str


def rows() -> list[Row]:
    table = PAGE.read_text(encoding="utf-8").partition("| model | architecture |")[2].partition("\n\n")[0]
    found = []
    for line in table.splitlines()[2:]:
        models, architecture, works, checked = (cell.strip() for cell in line.strip("|").split("|"))
        found.append(Row(models, architecture.replace("`", "").split(", "), works, checked))
    return found


ROWS = rows()


def test_every_family_has_a_row_and_every_row_a_builder() -> None:
    named = {architecture for row in ROWS for architecture in row.architectures}
    assert named == BUILDERS.keys()
    assert FAMILIES.keys() <= named
    assert {"own layers", "transformers", "refused"} == {re.split("[,:;]", row.works)[0] for row in ROWS}


def test_every_prompt_has_a_row() -> None:
    shown = {found for row in ROWS for found in re.findall(r"prompt `(.+?)`", row.works)}
    assert shown == PROMPTS.keys()


@pytest.mark.parametrize("row", ROWS, ids=[row.models.split(",")[0] for row in ROWS])
def test_a_row_does_what_it_says(row: Row, tmp_path: Path) -> None:
    names = re.findall(r"[\w.]+-[\w.-]+", row.models) or ["model"]
    prompt = (re.findall(r"prompt `(.+?)`", row.works) or [None])[0]
    for name in names:
        assert official_prompt(name) == (None if prompt is None else PROMPTS[prompt]), name
    for number, architecture in enumerate(row.architectures):
        directory = BUILDERS[architecture](tmp_path / str(number) / names[0])
        if row.works.startswith("refused"):
            with pytest.raises(GratingError) as refused:
                Reranker.from_pretrained(directory)
            assert row.works.partition(": ")[2] in str(refused.value).replace("\n", " ")
            continue
        done = grating("models", str(directory), "--device", "cpu", "--json")
        assert done.exit_code == 0, done.stderr
        told = json.loads(done.stdout)
        engine = re.split("[,:;]", row.works)[0]
        assert told["engine"] == {"own layers": "grating"}.get(engine, engine)
        kinds = {"question": "chat", "own files": "own", "all documents": "list"}
        usual = next((kind for words, kind in kinds.items() if words in row.works), "pair")
        assert told["format"] == (prompt or usual)
        with Reranker.from_pretrained(directory, device="cpu", dtype="float32") as reranker:
            result = reranker.rerank("yes w1", ["w2", "w3 w4 no", ""], top_k=2)
        assert len(result.ranking) == 2
        assert all(isfinite(ranked.score) for ranked in result.ranking)
        assert (result.trace.kernels == "transformers") == (engine == "transformers")
