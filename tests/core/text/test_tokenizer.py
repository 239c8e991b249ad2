"""Token ids of strangers' texts: as the reference makes them, never a special token, no more read than is used."""

import pickle
import random
import resource
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from benchmarks.shapes import find_or_write
from grating_core import ModelNotFoundError, Reranker
from grating_core.text import tokenizer as module
from grating_core.text.tokenizer import TextTokenizer

CORPUS = [text for topic in list(topics.values())[:12] for text in topic.split("\n\n")]
CONTROLS = ["<s>", "</s>", "<|im_end|>", "<start_of_turn>"]
# Three digits at a time, counted from the right end of a number: it takes all of it to know where one begins.
DIGITS = r"\d{1,3}(?=(?:\d{3})*(?!\d))|\s+(?!\S)|\s+|[^\d\s]+"


def _trained(
    model: object, trainer: object, normalizer: object, pre_tokenizer: object, decoder: object
) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, pre_tokenizer, decoder
    tokenizer.train_from_iterator(CORPUS, trainer)
    # <start_of_turn> has a meaning though it is not special, as in Gemma; the line breaks are Gemma's, too.
    tokenizer.add_special_tokens([*CONTROLS[:2], AddedToken(CONTROLS[2], rstrip=True, normalized=False)])
    tokenizer.add_tokens([AddedToken(CONTROLS[3], normalized=False), AddedToken("\n\n", normalized=False), "<td>"])
    return tokenizer


def byte_level() -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    return _trained(
        models.BPE(), trainer, None, pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    )


def looking_ahead() -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    split = pre_tokenizers.Split(Regex(DIGITS), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _trained(
        models.BPE(), trainer, normalizers.NFC(), pre_tokenizers.Sequence([split, level]), decoders.ByteLevel()
    )


def _byte_fallback(prepend: bool) -> Tokenizer:
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", *bytes_], show_progress=False)
    marks = [normalizers.Prepend("▁")] * prepend + [normalizers.Replace(" ", "▁")]
    model = models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)] * prepend
    )
    trained = _trained(model, trainer, normalizers.Sequence(marks), None, decoder)
    # To the trainer bytes were special; to a real tokenizer they are not.
    found = Tokenizer(trained.model)
    found.normalizer, found.decoder = trained.normalizer, trained.decoder
    found.add_special_tokens(["<unk>"])
    for token in list(trained.get_added_tokens_decoder().values())[257:]:
        found.add_tokens([token])
    return found


def llama2() -> Tokenizer:
    return _byte_fallback(prepend=True)


def gemma() -> Tokenizer:
    return _byte_fallback(prepend=False)


def _unigram(split: bool) -> Tokenizer:
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    space = pre_tokenizers.Metaspace(prepend_scheme="always" if split else "first", split=split)
    return _trained(models.Unigram(), trainer, normalizer, space, decoders.Metaspace())


def metaspace() -> Tokenizer:
    return _unigram(split=True)


def one_word() -> Tokenizer:
    return _unigram(split=False)


def whole_words() -> Tokenizer:
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", "the", "of", "a", "is"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>", *CONTROLS[:3]])
    tokenizer.add_tokens([CONTROLS[3]])
    return tokenizer


TINY: list[Callable[[], Tokenizer]] = [
    byte_level, looking_ahead, llama2, gemma, metaspace, one_word, whole_words
]  # fmt: skip


@pytest.fixture(
    scope="module", params=[*TINY, "bundled", "smollm2"], ids=lambda made: getattr(made, "__name__", made)
)
def backend(request: pytest.FixtureRequest) -> Tokenizer:
    found = request.param() if callable(request.param) else real(request.param, request)
    found.no_padding()
    found.no_truncation()
    return found


def real(name: str, request: pytest.FixtureRequest) -> Tokenizer:
    if name == "bundled":
        bundled: Reranker = request.getfixturevalue("bundled")
        return Tokenizer.from_file(str(bundled.model_path / "tokenizer.json"))
    try:
        return Tokenizer.from_file(str(Path(find_or_write("smollm2-135m")) / "tokenizer.json"))
    except ModelNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def tokenizer(backend: Tokenizer) -> TextTokenizer:
    return TextTokenizer(backend, CONTROLS)


def reference(backend: Tokenizer, text: str) -> list[int]:
    return backend.encode(text, add_special_tokens=False).ids


PIECES = [
    "word", " ", "  ", "\n", "\n\n", "the ", "of Berlin", "12345", "7", "e\u0301", "\u0301", "\ufb01", "\u212b",
    "人口", "שלום", "🎉", "👩\u200d👩\u200d👧", "a" * 40,
    "=" * 17, '{"k":[1,2]}', "'ll", ". ", "<td>", "_", "\x00", "\u200b", "\t",
]  # fmt: skip
SOUP = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)
TEXT = st.one_of(SOUP, st.text(max_size=40))


def long_text(seed: int, pieces: list[str], length: int, spaced: bool) -> str:
    chance = random.Random(seed)
    chosen = chance.sample(pieces, min(len(pieces), 6))
    text = "".join((" " if spaced else "") + chance.choice(chosen) for _ in range(length))
    return text if spaced else text.replace(" ", "").replace("\n", "")


LONG = st.one_of(
    st.builds(long_text, st.integers(0, 10**6), st.just(PIECES), st.integers(100, 1500), st.booleans()),
    st.integers(0, len(CORPUS) - 40).map(lambda place: "\n\n".join(CORPUS[place : place + 40])),
    st.builds(lambda piece, count: piece * count, st.sampled_from(PIECES), st.integers(100, 4000)),
    st.builds(
        lambda piece, count, rest: piece * count + rest, st.sampled_from(PIECES), st.integers(2000, 5000), SOUP
    ),
    st.builds(lambda text, times: (text or "x") * times, TEXT, st.integers(50, 400)),
)


# As text


@given(text=TEXT)
def test_tokens_before_a_place_are_counted(tokenizer: TextTokenizer, text: str) -> None:
    (counts,) = tokenizer.count_before([text], [range(len(text) + 1)])
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, len(tokenizer.ids(text)))


@given(text=TEXT)
def test_harmless_texts_have_the_ids_of_the_reference(
    backend: Tokenizer, tokenizer: TextTokenizer, text: str
) -> None:
    if not any(control in text for control in tokenizer.controls):
        assert tokenizer.ids(text) == reference(backend, text)
        assert tokenizer.ids(tokenizer.written(text)) == reference(backend, text)


def meaningful(backend: Tokenizer, tokenizer: TextTokenizer) -> set[int]:
    unknown = {token.id for token in backend.model.tokenize("\U0010fffd")}
    return {
        number for control in tokenizer.controls if (number := backend.token_to_id(control)) is not None
    } - unknown


@given(data=st.data())
def test_no_text_becomes_a_token_with_a_meaning(
    backend: Tokenizer, tokenizer: TextTokenizer, data: st.DataObject
) -> None:
    dangerous = st.sampled_from([*sorted(tokenizer.controls), *[c.upper() for c in tokenizer.controls], "<", ">"])
    text = data.draw(st.lists(st.one_of(dangerous, SOUP), max_size=8).map("".join))
    (found,) = tokenizer.encode([text])
    assert meaningful(backend, tokenizer).isdisjoint(found.ids)
    assert max(found.ids, default=0) < backend.get_vocab_size()


@given(data=st.data())
def test_the_templates_own_tokens_stay_tokens(
    backend: Tokenizer, tokenizer: TextTokenizer, data: st.DataObject
) -> None:
    parts = st.one_of(st.sampled_from(sorted(tokenizer.controls)), TEXT)
    text = data.draw(st.lists(parts, max_size=8).map("".join))
    assert tokenizer.ids(tokenizer.written(text)) == reference(backend, text)


@given(
    head=st.lists(st.sampled_from(["<s>", "<|im_end|>", "<start_of_turn>", "user", "\n", " ", ": "])).map("".join),
    text=TEXT,
)
def test_a_text_within_a_piece_has_the_ids_that_it_has_there(
    backend: Tokenizer, tokenizer: TextTokenizer, head: str, text: str
) -> None:
    if any(control in text for control in tokenizer.controls):
        return
    (found,) = tokenizer.encode([text], before=tokenizer.written(head))
    assert found.before + found.ids == reference(backend, head + text)


def test_it_can_be_pickled(backend: Tokenizer, tokenizer: TextTokenizer) -> None:
    text = f"one {CONTROLS[2]} two\n\n"
    again: TextTokenizer = pickle.loads(pickle.dumps(tokenizer))
    assert again.ids(text) == tokenizer.ids(text)
    assert again.ids(again.written(text)) == reference(backend, text)


# Long texts


@settings(max_examples=60)
@given(text=LONG, most=st.integers(1, 60), head=st.sampled_from(["", "Document: ", "x"]))
def test_a_long_text_begins_as_all_of_it_would(
    backend: Tokenizer, tokenizer: TextTokenizer, text: str, most: int, head: str
) -> None:
    (whole,) = tokenizer.encode([text], before=head)
    (found,) = tokenizer.encode([text], most, before=head)
    assert found.before == whole.before
    assert found.ids[: most + 1] == whole.ids[: most + 1]


@settings(max_examples=40)
@given(texts=st.lists(LONG, min_size=2, max_size=5), most=st.integers(1, 60), head=st.sampled_from(["", "x"]))
def test_long_texts_are_read_together_as_each_is_alone(
    tokenizer: TextTokenizer, texts: list[str], most: int, head: str
) -> None:
    alone = [found for text in texts for found in tokenizer.encode([text], most, before=head)]
    assert list(tokenizer.encode(texts, most, before=head)) == alone


@pytest.mark.parametrize("piece", ["x", "\n", " \t", "word ", "ภาษาไทย", "a\u0301", "👨\u200d👩"])
def test_a_document_of_megabytes_takes_no_memory_to_cut(bundled: Reranker, piece: str) -> None:
    tokenizer = TextTokenizer(Tokenizer.from_file(str(bundled.model_path / "tokenizer.json")))
    text = piece * (4_000_000 // len(piece)) + " end"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (found,) = tokenizer.encode([text], 512)
    assert len(found.ids) > 512 or tokenizer.ids(piece * 2000 + " end") == found.ids
    assert tokenizer.tail(text, 100).endswith("end")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000, "kilobytes"


@settings(max_examples=60)
@given(text=LONG, part=st.sampled_from([64, 500, 2000]))
def test_a_text_counted_in_parts_has_as_many_tokens(
    backend: Tokenizer, tokenizer: TextTokenizer, text: str, part: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "COUNTED_AT_ONCE", part)
        assert tokenizer.count(text) == len(tokenizer.ids(text))


@settings(max_examples=50)
@given(place=st.integers(0, len(CORPUS) - 40), tokens=st.integers(1, 60), cut=st.integers(0, 400))
def test_the_tail_of_a_long_text_is_that_of_all_of_it(
    backend: Tokenizer, tokenizer: TextTokenizer, place: int, tokens: int, cut: int
) -> None:
    text = "\n\n".join(CORPUS[place : place + 40])[: -cut or None]
    assert not any(control in text for control in tokenizer.controls)
    offsets = backend.encode(text, add_special_tokens=False).offsets
    assert tokenizer.tail(text, tokens) == (text if len(offsets) <= tokens else text[offsets[-tokens][0] :])


@given(text=LONG, tokens=st.integers(1, 60))
def test_the_tail_of_any_text_is_its_end(tokenizer: TextTokenizer, text: str, tokens: int) -> None:
    found = tokenizer.tail(text, tokens)
    assert text.endswith(found)
