"""Text of tokens that come one by one: characters of several tokens, stop strings, what is held back."""

from itertools import accumulate, takewhile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from grating_core.text.streamed import TextStream
from tests.core.text.test_tokenizer import byte_level, gemma, llama2, metaspace


def byte_tokenizer() -> Tokenizer:
    """Every byte is a token, so that most characters beyond English take several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


BYTES = byte_tokenizer()


def streamed(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(BYTES, BYTES.encode("before").ids, stop)
    pieces = []
    for token in BYTES.encode(text).ids:
        pieces.append(stream.add(token))
        if stream.stopped:
            break
    return pieces, stream


def first_stop(text: str, stop: tuple[str, ...]) -> str:
    """What comes before the stop string that is complete first."""
    for end in range(len(text) + 1):
        found = [text[:end].find(one) for one in stop if one in text[:end]]
        if found:
            return text[: min(found)]
    return text


@given(st.text(st.characters(codec="utf-8"), max_size=30))
def test_the_text_comes_whole(text: str) -> None:
    pieces, stream = streamed(text)
    assert "".join(pieces) + stream.rest() == text


def test_a_character_comes_with_its_last_byte() -> None:
    assert streamed("a🎉é")[0] == ["a", "", "", "", "🎉", "", "é"]


@given(st.text("ab c", max_size=25), st.lists(st.text("ab c", min_size=1, max_size=5), max_size=3))
def test_the_text_ends_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    stop = tuple(stops)
    pieces, stream = streamed(text, stop)
    expected = first_stop(text, stop)
    assert stream.stopped == (expected != text or any(one in text for one in stop))
    assert "".join(pieces) + stream.rest() == expected
    # Nothing is shown that would have had to be taken back, and nothing is held back for longer than need be.
    for shown, seen in zip(accumulate(pieces), accumulate(text), strict=False):
        if not any(one in seen for one in stop):
            held = seen[len(shown) :]
            assert seen.startswith(shown)
            assert not held or any(one.startswith(held) for one in stop)


DECODING = {"byte-level": byte_level, "with a prefix": llama2, "without": gemma, "metaspace": metaspace}


@pytest.fixture(scope="module", params=DECODING)
def backend(request: pytest.FixtureRequest) -> Tokenizer:
    return DECODING[request.param]()


@given(data=st.data())
def test_the_pieces_are_what_decoding_everything_gives(backend: Tokenizer, data: st.DataObject) -> None:
    """Any tokens in any order, among them prompts and texts that end in the middle of a character."""
    size = backend.get_vocab_size()
    byte = [number for name, number in backend.get_vocab().items() if name.startswith("<0x") or len(name) == 1]
    euro = [token for text in ("\u20ac\u20ac", "é🎉") for token in backend.encode(text).ids]
    token = st.one_of(st.integers(0, size - 1), st.sampled_from(byte), st.sampled_from(euro))
    tokens = st.lists(token, max_size=30)
    cut = st.integers(0, 12)
    text = data.draw(st.one_of(tokens, tokens.map(lambda ids: ids * 6), cut.map(lambda at: (euro * 2)[at:])))
    prompt = data.draw(st.one_of(tokens, cut.map(lambda at: (euro * 2)[:at])))
    stream = TextStream(backend, prompt, ())
    pieces = [stream.add(token) for token in text]
    before, everything = (backend.decode(ids, skip_special_tokens=True) for ids in (prompt, prompt + text))
    alike = takewhile(lambda both: both[0] == both[1], zip(before, everything, strict=False))
    shared = sum(1 for _ in alike)
    assert "".join(pieces) + stream.rest() == everything[shared:]
    if not before.endswith("\ufffd") and everything.startswith(before):
        assert shared == len(before)


def test_a_prompt_that_ends_in_a_character(backend: Tokenizer) -> None:
    ids = backend.encode("a 🎉 b").ids
    text = backend.decode(ids)
    for end in range(1, len(ids)):
        stream = TextStream(backend, ids[:end], ())
        shown = "".join([stream.add(token) for token in ids[end:]]) + stream.rest()
        assert text.endswith(shown), "no sign for a broken character leaks"


def test_special_tokens_have_no_text() -> None:
    stream = TextStream(BYTES, [], ())
    assert [stream.add(BYTES.token_to_id(token)) for token in ("a", "<end>", "b")] == ["a", "", "b"]


@pytest.mark.parametrize("prompt", ["x", "x y", ""])
def test_spaces_are_read_by_what_comes_before(prompt: str) -> None:
    """Words of sentencepiece begin with their space, which the first word of a text does not show."""
    words = {"▁x": 0, "▁y": 1, "▁z": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="▁x"))
    tokenizer.decoder = decoders.Metaspace()
    ids = [words[f"▁{word}"] for word in prompt.split()]
    stream = TextStream(tokenizer, ids, ())
    assert [stream.add(1), stream.add(2)] == [" y" if prompt else "y", " z"]
