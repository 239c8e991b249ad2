"""The adapters' classes have the settings of the one list as their fields, and no others that say the same."""

from dataclasses import MISSING, fields

import pytest
from langchain_grating import ChatGrating, GratingContextSelector, GratingCrossEncoder, GratingRerank
from llama_index.llms.grating import GratingLLM
from llama_index.postprocessor.grating import GratingContextSelector as LlamaIndexSelector
from llama_index.postprocessor.grating import GratingRerank as LlamaIndexRerank
from pydantic import SecretStr

from grating_core.frameworks.language_models import LanguageModelFields
from grating_core.frameworks.rerankers import DEFAULT_MODEL, RerankerFields
from grating_core.settings import AnswerSettings, GenerationSettings, RerankSettings

RERANKERS = [GratingRerank, GratingContextSelector, GratingCrossEncoder, LlamaIndexRerank, LlamaIndexSelector]
LANGUAGE_MODELS = [ChatGrating, GratingLLM]
# Where an adapter differs from the list: the names and the empty values of both frameworks.
NAMES = {"max_new_tokens": "max_tokens"}
DEFAULTS = {"model": DEFAULT_MODEL, "stop": None}


@pytest.mark.parametrize(
    ("cls", "settings"),
    [(cls, RerankSettings) for cls in RERANKERS]
    + [(cls, kind) for cls in LANGUAGE_MODELS for kind in (GenerationSettings, AnswerSettings)],
)
def test_a_class_has_the_names_defaults_and_descriptions(cls, settings):
    for one in fields(settings):
        if one.name == "show_progress":  # a library shows no bars
            assert one.name not in cls.model_fields
            continue
        field = cls.model_fields[NAMES.get(one.name, one.name)]
        assert field.description == one.metadata["about"]
        if one.default is MISSING and settings is GenerationSettings:
            assert field.is_required()
        else:
            assert field.default == DEFAULTS.get(one.name, one.default), one.name


@pytest.mark.parametrize("cls", [*RERANKERS, *LANGUAGE_MODELS])
def test_every_field_is_described_in_sentences(cls):
    shared = LanguageModelFields if cls in LANGUAGE_MODELS else RerankerFields
    own = cls.__annotations__.keys() | {
        name for base in cls.__mro__ if base.__module__.startswith("grating_core") for name in base.model_fields
    }
    assert own >= shared.model_fields.keys()
    for name in own:
        about = cls.model_fields[name].description
        assert about.endswith("."), name
        assert about[0].isupper() or about[0] == "'", name


def test_what_both_frameworks_have_is_the_same_in_both():
    for one, other in [(GratingRerank, LlamaIndexRerank), (GratingContextSelector, LlamaIndexSelector)]:
        for name in one.model_fields.keys() & other.model_fields.keys() - {"top_n"}:
            here, there = one.model_fields[name], other.model_fields[name]
            assert (here.annotation, here.description) == (there.annotation, there.description)
    chat, llm = (cls.model_fields for cls in LANGUAGE_MODELS)
    assert all(chat[name].annotation == llm[name].annotation for name in LanguageModelFields.model_fields)


@pytest.mark.parametrize("cls", [*RERANKERS, *LANGUAGE_MODELS])
def test_what_json_cannot_hold_is_text_and_a_token_is_a_secret(cls):
    types = {name: cls.model_fields[name].annotation for name in ("device", "dtype", "cache_dir", "token")}
    assert types == {
        "device": str | None,
        "dtype": str,
        "cache_dir": str | None,
        "token": SecretStr | bool | None,
    }
    assert [name for name, field in cls.model_fields.items() if field.exclude and name in types] == ["token"]


@pytest.mark.parametrize(
    ("cls", "given", "meant"),
    [
        (GratingRerank, "memory_bugdet", "memory_budget"),
        (LlamaIndexRerank, "prunning", "pruning"),
        (ChatGrating, "tempreature", "temperature"),
    ],
)
def test_a_misspelt_field_leads_to_the_right_one(cls, given, meant):
    with pytest.raises(ValueError, match=f"{given} is not known to {cls.__name__}: did you mean {meant}?"):
        cls(model="owner/name", **{given: 1})


@pytest.mark.parametrize("cls", [ChatGrating, GratingLLM])
def test_a_language_model_refuses_settings_before_it_is_loaded(cls):
    with pytest.raises(ValueError, match=r"mlp_density=3\.0 must be a number above 0"):
        cls(model="owner/name", mlp_density=3)
