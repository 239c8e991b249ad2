"""Models on a hub: which version, where it is kept, and who asks, which nobody else is to read."""

import copy
import pickle

import pytest
from llama_index.postprocessor.grating import GratingContextSelector, GratingRerank

from tests.core.conftest import save_model
from tests.core.models.test_hub import FIRST, NAME, TOKEN, cached


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Arguments that find a version of a model in a hub's cache."""
    cache = tmp_path_factory.mktemp("hub")
    cached(cache, FIRST, save_model(tmp_path_factory.mktemp("old"), "bert"), "old")
    return {"model": NAME, "local_files_only": True, "revision": "old", "cache_dir": cache}


def test_a_version_is_loaded_and_a_token_stays_here(hub):
    postprocessor = GratingRerank(**hub, token=TOKEN)
    assert postprocessor.reranker.model_path.name == FIRST
    pickled = pickle.dumps(postprocessor)
    written = [repr(postprocessor), repr(postprocessor.to_dict()), postprocessor.to_json(), repr(pickled)]
    assert not [text for text in written if TOKEN in text]
    for twin in (pickle.loads(pickled), GratingRerank.from_json(postprocessor.to_json())):
        assert (twin.token, twin.revision, twin.cache_dir) == (None, "old", str(hub["cache_dir"]))
    for twin in (copy.copy(postprocessor), copy.deepcopy(postprocessor), postprocessor.model_copy()):
        assert twin.token.get_secret_value() == TOKEN
        assert twin.reranker is postprocessor.reranker
    given = {name: hub[name] for name in ("local_files_only", "revision")}
    as_theirs = GratingRerank(2, NAME, token=TOKEN, cache_dir=hub["cache_dir"], cross_encoder_kwargs=given)
    assert as_theirs.reranker is postprocessor.reranker


def test_errors_do_not_quote_a_token(hub):
    postprocessor = GratingRerank(**hub, token=TOKEN)
    for fail in (
        lambda: GratingRerank(**hub, token=TOKEN, score_threshold=3.0, scores="estimated"),
        lambda: GratingContextSelector(**hub, token=TOKEN),
        lambda: setattr(postprocessor, "token", TOKEN),
    ):
        with pytest.raises((ValueError, AttributeError)) as refusal:
            fail()
        assert TOKEN not in str(refusal.value)
