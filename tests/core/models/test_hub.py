"""Models on a hub: which version, who asks, where files are kept; and hubs that do not do what they should."""

import shutil
from contextlib import closing
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from grating_core import ModelNotFoundError, Reranker, StreamedCausalLM
from grating_core.models.hub import Hub
from grating_core.opening.rerankers import open_reranker
from grating_core.settings import RerankSettings
from tests.core.conftest import DECODER, SIZES, save_model, save_tokenizer
from tests.core.parity import load

FIRST, SECOND = "0" * 40, "1" * 40
NAME = "someone/tiny"
PAIRS = [("w1 w2", "w3 w4 w5"), ("w1", "w9 w10")]
TOKEN = "hf_secretsecretsecret"


def cached(cache: Path, commit: str, source: Path, *refs: str) -> Path:
    """A model as the hub's own library keeps it."""
    repository = cache / "models--someone--tiny"
    shutil.copytree(source, repository / "snapshots" / commit)
    (repository / "refs").mkdir(exist_ok=True)
    for ref in refs:
        (repository / "refs" / ref).write_text(commit)
    return repository / "snapshots" / commit


@pytest.fixture(scope="module")
def other_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("other"), "bert", seed=1)


def test_a_revision_is_what_is_loaded(tiny_bert: Path, other_bert: Path, tmp_path: Path) -> None:
    old = cached(tmp_path, FIRST, tiny_bert, "v1.0+cpu")
    new = cached(tmp_path, SECOND, other_bert, "main")
    how = {"cache_dir": tmp_path, "local_files_only": True, "dtype": "float32", "device": "cpu", "pruning": "off"}
    for revision, snapshot, source in [
        (None, new, other_bert),
        ("main", new, other_bert),
        ("v1.0+cpu", old, tiny_bert),
        (FIRST, old, tiny_bert),
    ]:
        reranker = Reranker.from_pretrained(NAME, revision=revision, **how)
        assert reranker.model_path == snapshot
        assert reranker.score(PAIRS) == load(source).score(PAIRS)
        found = {"cache_dir": tmp_path, "local_files_only": True, "revision": revision}
        with closing(open_reranker(RerankSettings(model=NAME, memory_budget="1GB", **found))) as opened:
            assert opened.directory == snapshot
            assert opened.plan is not None


def test_revisions_are_not_shared(tiny_bert: Path, other_bert: Path, tmp_path: Path) -> None:
    cached(tmp_path, FIRST, tiny_bert, "old")
    cached(tmp_path, SECOND, other_bert, "main")
    how = {"cache_dir": tmp_path, "local_files_only": True, "token": TOKEN}
    newest, old = Reranker.shared(NAME, **how), Reranker.shared(NAME, revision="old", **how)
    assert newest is Reranker.shared(NAME, **how)
    assert old is Reranker.shared(NAME, revision="old", **how)
    assert newest.score(PAIRS) != old.score(PAIRS)


def test_language_models_and_adapters_take_them_too(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "source", types=False)
    LlamaForCausalLM(LlamaConfig(**SIZES, **DECODER)).save_pretrained(tmp_path / "source")
    snapshot = cached(tmp_path, FIRST, tmp_path / "source", "old")
    how = {"cache_dir": str(tmp_path), "local_files_only": True, "token": TOKEN}
    assert StreamedCausalLM.from_pretrained(NAME, revision="old", **how).model_path == snapshot
    with pytest.raises(ModelNotFoundError, match="someone/tiny"):
        StreamedCausalLM.from_pretrained(NAME, **how)  # there is no main
    # The adapter is looked for at its newest: it is not the model of which there is a revision.
    with pytest.raises(ModelNotFoundError, match=r"adapter='some/adapter'") as refused:
        StreamedCausalLM.from_pretrained(NAME, adapter="some/adapter", revision="old", **how)
    assert "'old'" not in str(refused.value)


def test_what_is_not_on_the_hub_ignores_them(tiny_bert: Path, tmp_path: Path) -> None:
    reranker = Reranker.from_pretrained(tiny_bert, revision="v3", token=TOKEN, cache_dir=tmp_path / "none")
    assert reranker.model_path == tiny_bert


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"revision": ""}, "revision=''"),
        ({"revision": 5}, "revision=5"),
        ({"revision": "../../elsewhere"}, "revision='../../elsewhere'"),
        ({"revision": "/etc"}, "revision='/etc'"),
        ({"cache_dir": 5}, "cache_dir=5"),
        ({"cache_dir": ""}, "cache_dir=''"),
        ({"cache_dir": Path("~no-such-user/x")}, "cache_dir='~no-such-user/x'"),
        ({"local_files_only": "no"}, "local_files_only='no'"),
        ({"token": 7}, "token must be"),
        ({"token": f"{TOKEN}\n"}, "token must be"),  # as read from a file
        ({"token": ""}, "token must be"),
    ],
)
def test_senseless_settings_are_named(settings: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told) as refused:
        Reranker.from_pretrained(NAME, **settings)
    assert TOKEN not in str(refused.value)


def test_a_token_is_not_shown(tmp_path: Path) -> None:
    assert TOKEN not in repr(Hub(token=TOKEN))
    assert Hub(token=TOKEN) != Hub(token=None)
    with pytest.raises(ModelNotFoundError, match=r"someone/tiny.*in revision 'v2'") as refused:
        Reranker.from_pretrained(NAME, revision="v2", token=TOKEN, cache_dir=tmp_path, local_files_only=True)
    assert TOKEN not in str(refused.value)
