"""Models by name, and which names they get."""

from pathlib import Path

import pytest

from grating_core.serving.errors import Refused
from grating_core.serving.models import ServedModels
from grating_core.serving.settings import ServeSettings
from grating_core.settings import RerankSettings


def opened(model: Path, **settings: object) -> ServedModels:
    return ServedModels.open(RerankSettings(model=model, dtype="float32", device="cpu"), ServeSettings(**settings))


def test_a_directory_is_served_by_its_last_name(tiny_bert: Path) -> None:
    models = opened(tiny_bert, also=[f"second={tiny_bert}"])
    assert [model.name for model in models] == [tiny_bert.name, "second"]
    assert models.named(None) is models.named(tiny_bert.name) is models.default
    assert models.named("second") is not models.default
    with pytest.raises(Refused) as refused:
        models.named(str(tiny_bert))
    assert refused.value.message == f"model is none of those that are served here: {tiny_bert.name}, second"
    models.close()
    assert all(model.reranker.closed for model in models)


def test_only_the_path_is_left_out_of_a_name(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bert-2.5-base").symlink_to(tiny_bert)
    monkeypatch.chdir(tmp_path)
    models = opened(tiny_bert, also=["bert-2.5-base", "other=bert-2.5-base"])
    assert [model.name for model in models] == [tiny_bert.name, "bert-2.5-base", "other"]
    models.close()


def test_a_name_that_two_models_have_is_refused(tiny_bert: Path) -> None:
    with pytest.raises(ValueError, match="two models have the same name"):
        opened(tiny_bert, name="same", also=[f"same={tiny_bert}"])


def test_further_models_share_the_settings(tiny_bert: Path) -> None:
    settings = RerankSettings(model=tiny_bert, dtype="float32", device="cpu", max_length=50, pruning="off")
    models = ServedModels.open(settings, ServeSettings(also=[f"x={tiny_bert}"]))
    assert [model.reranker.max_length for model in models] == [50, 50]
    models.close()
