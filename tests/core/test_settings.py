"""The one list of settings: whoever takes settings has these names, types and defaults."""

import inspect
import pickle
from dataclasses import MISSING, fields
from pathlib import Path

import numpy as np
import pytest
import torch

from grating_core import ClusterPolicy, Prompt, Reranker, StreamedCausalLM
from grating_core.serving.settings import ServeSettings
from grating_core.settings import AnswerSettings, GenerationSettings, ModelSettings, RerankSettings

LOADERS = [(Reranker.from_pretrained, RerankSettings), (StreamedCausalLM.from_pretrained, GenerationSettings)]
ANSWERS = [(StreamedCausalLM.generate, AnswerSettings), (StreamedCausalLM.stream, AnswerSettings)]


@pytest.mark.parametrize(("function", "settings"), LOADERS + ANSWERS)
def test_signatures_have_the_names_types_and_defaults(function: object, settings: type) -> None:
    signature = inspect.signature(function, eval_str=False)
    listed = {one.name: one for one in fields(settings)}
    taken = {name: one for name, one in signature.parameters.items() if name not in ("self", "prompt")}
    assert taken.keys() == listed.keys()
    for name, parameter in taken.items():
        default = inspect.Parameter.empty if listed[name].default is MISSING else listed[name].default
        assert parameter.default == default
        assert parameter.annotation.removesuffix(" | None") == listed[name].type.removesuffix(" | None"), name


@pytest.mark.parametrize("settings", [RerankSettings, GenerationSettings, AnswerSettings, ServeSettings])
def test_every_setting_is_described_in_sentences(settings: type) -> None:
    for one in fields(settings):
        about = one.metadata["about"]
        assert about.endswith("."), one.name
        assert about[0].isupper() or about[0] == "'", one.name


@pytest.mark.parametrize("settings", [RerankSettings, GenerationSettings])
def test_a_beginner_sees_six_settings_at_most(settings: type) -> None:
    assert sum(one.metadata["basic"] for one in fields(settings)) <= 6


def test_none_is_the_default_of_every_setting() -> None:
    names = {one.name for one in fields(RerankSettings)} - {"model"}
    assert RerankSettings(model="a/b", **dict.fromkeys(names)) == RerankSettings(model="a/b")


@pytest.mark.parametrize(
    "setting",
    [{"port": 65_536}, {"port": -1}, {"max_body": 0}, {"max_documents": 0}, {"max_tokens": "many"},
     {"queue_tokens": 1.5}, {"deadline": 0}, {"deadline": float("inf")}, {"drain": -1}],
)  # fmt: skip
def test_a_bad_setting_of_the_server_is_refused_by_name(setting: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(setting))}="):
        ServeSettings(**setting)


def test_the_key_of_the_server_is_not_shown() -> None:
    assert "secret" not in repr(ServeSettings(api_key="secret"))


def test_settings_can_be_hashed_compared_and_pickled(tmp_path: Path) -> None:
    given = {"pruning": ClusterPolicy(2.0), "template": Prompt(("{query} {document}",)), "memory_budget": "1GB"}
    one, other = (RerankSettings(model=tmp_path, **given) for _ in range(2))
    assert one.budget == 10**9
    assert one == other == pickle.loads(pickle.dumps(one))
    assert hash(one) == hash(other)
    assert one != RerankSettings(model=tmp_path, **given, target=0.9)
    assert one == RerankSettings(model=tmp_path, **given, show_progress=True)  # it makes no other model


def test_paths_mean_the_same_in_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert ModelSettings(model="model", cache_dir=Path("cache")).model == str(tmp_path / "model")
    # The hub's files go there later, and another process has to find them.
    assert ModelSettings(model="model", cache_dir=Path("cache")).cache_dir == str(tmp_path / "cache")
    assert ModelSettings(model="owner/name").model == "owner/name"
    assert ModelSettings(model="").model == ""


def test_a_token_is_not_shown_and_does_not_travel() -> None:
    settings = ModelSettings(model="a/b", token="hf_secret")
    assert "hf_secret" not in repr(settings)
    assert settings.portable() == ModelSettings(model="a/b")


@pytest.mark.parametrize("name", ["lens", "adapter", "cache_dir"])
@pytest.mark.parametrize("value", ["", 3, ["a"]])
def test_a_place_is_a_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name}=.* must be a directory"):
        RerankSettings(model="a/b", **{name: value})


def test_a_policy_is_an_object_and_not_its_class() -> None:
    with pytest.raises(ValueError, match=r"^pruning=.* is unknown; use 'auto'"):
        RerankSettings(model="a/b", pruning=ClusterPolicy)


@pytest.mark.parametrize("model", [None, 3, ["a"]])
def test_a_model_is_a_name(model: object) -> None:
    with pytest.raises(ValueError, match="model="):
        RerankSettings(model=model)


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("dtype", "bfloat16", torch.bfloat16),
        ("device", "cuda:1", torch.device("cuda", 1)),
        ("memory_budget", "300MB", 300_000_000),
        ("memory_budget", "300MB", " 0.3 GB"),
    ],
)
def test_one_setting_in_two_spellings_is_one(name: str, one: object, other: object) -> None:
    first, second = (RerankSettings(model="a/b", **{name: value}) for value in (one, other))
    assert first == second
    assert hash(first) == hash(second)


@pytest.mark.parametrize("value", [np.array([1, 2]), torch.tensor([1, 2]), b"x", 0.5, ["x"], ClusterPolicy])
@pytest.mark.parametrize(
    "name", ["device", "dtype", "lens", "adapter", "cache_dir", "guarantee", "long_documents", "pruning"]
)
def test_a_value_of_a_wrong_type_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name}="):
        Reranker.from_pretrained("bundled:ms-marco-minilm-l12", **{name: value})
