"""This module makes token ids of texts from strangers, and reads no more of a long text than is used."""

from __future__ import annotations

import re
import secrets
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import Unigram

_GROUP = 32  # texts
_CHARACTERS = 6  # characters that are read at first for each wanted token
_MARGIN = 256  # characters at the end of a part whose tokens may depend on the text behind it
_CUTS = {True: 32, False: 4}  # ends that are tried within a word: Unigram's longest pieces have 16 characters
COUNTED_AT_ONCE = 1 << 16
"""Characters whose tokens are counted at a time."""
_SPACE = re.compile(r"(?<=\w) (?=\w)")
# The patterns are possessive, because a match that can shrink takes 80 bytes a character.
_RUNS = (
    re.compile(r"(.)\1{999,}+|\s{1000,}+|[A-Za-z0-9]{1000,}+", re.DOTALL),
    # WordPiece takes such a run for one word: Thai, letters with accents, joined emoji, but no punctuation.
    re.compile(r"()(?<![^\s!-/:-@\[-`{-~])[^\s!-/:-@\[-`{-~]{1000,}+"),
)
_UNKNOWN = "\U0010fffd"  # a character of no language
_KEPT = 500  # characters that are kept of a run whose tokens do not depend on its length


def encodable(text: str) -> str:
    """Return a text with a question mark for each lone surrogate, which is half a character from broken JSON."""
    return text.encode("utf-8", "replace").decode("utf-8")


def alike(one: Sequence[object], other: Sequence[object]) -> int:
    """Return how many characters or tokens the two sequences have in common at their beginning."""
    return sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(one, other, strict=False)))


@dataclass(frozen=True, slots=True)
class Tokens:
    """This class holds the token ids of a text, and of the words before it in the same piece.

    Attributes:
        before: Ids of the words before the text. A token that both share is among them.
        ids: Ids of the text.
    """

    before: list[int]
    ids: list[int]


class TextTokenizer:
    """This tokenizer treats special tokens in a text as text.

    ``[SEP]`` in a document has the ids that its characters have. For all other texts the ids are those of the
    model's tokenizer. A template passes its own text through :meth:`written`, where special tokens are tokens.

    Args:
        backend: The model's tokenizer, whose vocabulary this tokenizer shares.
        controls: Special tokens that the model's tokenizer does not call special, such as ``<start_of_turn>``.
    """

    def __init__(self, backend: Tokenizer, controls: Iterable[str] = ()) -> None:
        self.backend = backend
        added = backend.get_added_tokens_decoder()
        self._controls = {
            token.content: number for number, token in added.items() if token.special or token.content in controls
        }
        self._twin = _twin(backend, added, self._controls)
        # Nobody can guess these names, so they distinguish the template's own tokens from a stranger's.
        key = secrets.token_hex(16)
        names = {content: f"<{key}:{number}>" for content, number in self._controls.items()}
        self._names, self._guard = names, f"<{key}>"
        self._written = _any_of(names)
        self._twin.add_tokens(
            [_copy(added[number], content=names[content]) for content, number in self._controls.items()]
        )
        self._twin.encode_special_tokens = True
        aliases = {self._twin.token_to_id(name): [self._controls[content]] for content, name in names.items()}
        self._replaced: dict[int | None, list[int]] = {**aliases, **self._reachable()}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.backend, tuple(self._controls))

    @property
    def controls(self) -> frozenset[str]:
        """The tokens that are special to the model."""
        return frozenset(self._controls)

    def written(self, text: str) -> str:
        """Mark the special tokens in a template's text, so that the other methods take them as tokens."""
        return self._written.sub(lambda found: self._names[found[0]], text).replace(self._guard, "")

    def guarded(self, text: str) -> str:
        """Guard a stranger's text before a template takes it in, so that :meth:`written` leaves it text."""
        return self._written.sub(lambda found: found[0][:1] + self._guard + found[0][1:], text)

    def leading_control(self, text: str) -> int | None:
        """Return the special token that a template's text begins with, white space aside; None if it has none."""
        found = self._written.match(text.lstrip())
        return None if found is None else self._controls[found[0]]

    def ids(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return self._mapped(self._encode(text).ids)

    def encode(self, texts: Sequence[str], most: int | None = None, *, before: str = "") -> Iterator[Tokens]:
        """Yield the token ids of each text.

        Args:
            texts: The texts.
            most: Number of tokens of each text that will be used; None for all. Only as much of a longer text is
                read as these tokens depend on, and more than ``most`` ids are returned.
            before: The words before each text. Their end may share a token with the text.
        """
        for start in range(0, len(texts), _GROUP):  # encodings are ten times as large as the token ids in them
            yield from self._together(texts[start : start + _GROUP], most, before)

    def count(self, text: str) -> int:
        """Return how many tokens a text has."""
        total = 0
        for part in self._parts(text):  # positions, which would take most of the memory, are not computed
            (found,) = self._twin.encode_batch_fast([encodable(part)], add_special_tokens=False)
            total += len(self._mapped(found.ids))
        return total

    def count_before(self, texts: Sequence[str], places: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return how many tokens of each text begin before each of some places, which count characters."""
        counts = []
        encoded = self._twin.encode_batch([encodable(text) for text in texts], add_special_tokens=False)
        for found, wanted in zip(encoded, places, strict=True):
            ids, starts = found.ids, [start for start, _ in found.offsets]
            numbers = [bisect_left(starts, place) for place in wanted]
            same = self._replaced.keys().isdisjoint(ids)
            counts.append(numbers if same else [len(self._mapped(ids[:number])) for number in numbers])
        return counts

    def tail(self, text: str, tokens: int) -> str:
        """Return the last tokens of a text as text, or the whole text if it has no more tokens.

        Only the end of a long text is read, beginning at a space. If no space is near, the cut may be a few
        characters off. If the end has hardly any tokens, less is kept.
        """
        size = _CHARACTERS * tokens + _MARGIN
        while size < len(text):
            start = len(text) - size
            space = next(self._spaces(text, start - size, start, within=True), start)
            offsets = self._encode(text[space:]).offsets
            if len(offsets) > tokens:
                return text[space + offsets[-tokens][0] :]
            if size > _CHARACTERS * tokens + COUNTED_AT_ONCE:
                return text[space:]
            size *= 4
        offsets = self._encode(text).offsets
        return text if len(offsets) <= tokens else text[offsets[-tokens][0] :]

    def _encode(self, text: str) -> Any:
        return self._twin.encode(encodable(text), add_special_tokens=False)

    def _divided(self, found: Any, begin: int, end: int) -> Tokens:
        start = sum(1 for first, _ in takewhile(lambda place: place[0] < begin, found.offsets)) if begin else 0
        return Tokens(self._mapped(found.ids[:start]), self._mapped(found.ids[start:end]))

    # Long texts

    def _together(self, texts: Sequence[str], most: int | None, before: str) -> list[Tokens]:
        """Return the tokens of each text: all, or more than ``most`` of those that have them."""
        longest = max(map(len, texts))
        size = first = longest if most is None else _CHARACTERS * (most + 1) + _MARGIN
        found: dict[int, Tokens] = {}
        left = dict(enumerate(texts))
        while left:
            # As many characters at a time as at first.
            each, numbers = max(1, _GROUP * first // max(1, size)), list(left)
            for start in range(0, len(numbers), each):
                some = {number: left[number] for number in numbers[start : start + each]}
                found |= self._read(some, size, most, before)
            left = {number: text for number, text in left.items() if number not in found}
            if most is not None and size == first:
                left = {number: self._squeezed(text, 2 * (most + 1)) for number, text in left.items()}
            size *= 4
        return [found[number] for number in range(len(texts))]

    def _read(self, texts: Mapping[int, str], size: int, most: int | None, before: str) -> dict[int, Tokens]:
        """Return the tokens of those texts of which so many characters are enough, by number."""
        pieces = [before + encodable(text[:size]) for text in texts.values()]
        # Positions, which take a fifth of the time, only say where a text is divided.
        whole = not before and max(map(len, texts.values())) <= size
        encode = self._twin.encode_batch_fast if whole else self._twin.encode_batch
        found = {}
        for number, piece, encoding in zip(texts, pieces, encode(pieces, add_special_tokens=False), strict=True):
            ended = len(texts[number]) <= size
            end = len(encoding) if ended else self._certain(piece, encoding)
            tokens = self._divided(encoding, len(before), end)
            if ended or most is None or len(tokens.ids) > most:
                found[number] = tokens
        return found

    def _certain(self, piece: str, found: Any) -> int:
        """Return how many of the tokens do not depend on the text behind the piece."""
        end = len(piece) - _MARGIN
        words, offsets = found.word_ids, found.offsets
        # In no pre-tokeniser do tokens before a space depend on text behind the next word.
        space = max(piece.rfind(" ", 0, end), piece.rfind("\n", 0, end))
        edge = next((number for number, (_, last) in enumerate(offsets) if last > space), len(found))
        while 0 < edge < len(found) and words[edge - 1] == words[edge]:
            edge -= 1
        if space > len(piece) // 2 and edge:
            return edge
        # Within a word, tokens depend on where the word ends. They are certain if they stay the same for each of
        # so many ends, because Unigram's longest pieces reach back no further.
        edge = next((number for number, (_, last) in enumerate(offsets) if last > end), len(found))
        cuts = [piece[:-cut] for cut in range(1, _CUTS[isinstance(self._twin.model, Unigram)] + 1)]
        for other in self._twin.encode_batch_fast(cuts, add_special_tokens=False):
            edge = alike(found.ids[:edge], other.ids)
        return edge

    def _squeezed(self, text: str, most: int) -> str:
        """Shorten the first long runs of a text that become one token, or none, whatever their length."""

        def shorter(run: re.Match[str]) -> str:
            few, more = (self._encode(run[0][:length]).ids for length in (_KEPT, 2 * _KEPT))
            same = few == more and len(few) <= 1
            if same and not run[1]:  # the characters differ, and any of them may be a token or divide the run
                kept = run[0][:_KEPT]
                same = self._encode(kept + "".join(set(run[0])) + kept).ids == few
                same = same and not (few and run[0].isspace())
            return run[0][:_KEPT] if same else run[0]

        for runs in _RUNS:
            text = runs.sub(shorter, text, count=most)
        return text

    def _parts(self, text: str) -> Iterator[str]:
        """Yield parts of a text. The tokens of all parts together are those of the whole text."""
        start = 0
        while len(text) - start > 2 * COUNTED_AT_ONCE:
            end = next(self._spaces(text, start + COUNTED_AT_ONCE, start + 2 * COUNTED_AT_ONCE), None)
            if end is None:
                break
            yield text[start:end]
            start = end
        yield text[start:]

    def _spaces(self, text: str, start: int, end: int, *, within: bool = False) -> Iterator[int]:
        """Yield the spaces where a text may be divided: tokens behind them do not depend on the text before.

        Args:
            text: The text.
            start: The first place to look at, in characters.
            end: The end of the search, in characters.
            within: Whether a division may be inside a piece that the pre-tokeniser does not divide.
        """
        for number, space in enumerate(_SPACE.finditer(text, max(0, start), end)):
            place = space.start()
            left, right = text[max(0, place - 32) : place], text[place : place + 32]
            both = self._encode(left + right)
            first = len(self._encode(left))
            if (
                0 < first < len(both)
                and (within or both.word_ids[first - 1] != both.word_ids[first])
                and both.ids[first:] == self._encode(right).ids
            ):
                yield place
            if number == 8:  # if these nine places fail, the others would fail as well
                return

    # Tokens that have a meaning

    def _mapped(self, ids: list[int]) -> list[int]:
        if self._replaced.keys().isdisjoint(ids):
            return ids
        return [token for found in ids for token in self._replaced.get(found, [found])]

    def _reachable(self) -> dict[int | None, list[int]]:
        """Return the special tokens that the model itself makes of a word (Unigram does), and their stand-ins."""
        found: dict[int | None, list[int]] = {}
        unknown = self._by_model(_UNKNOWN)  # a word without a token is unknown, as in any other text
        for content, number in self._controls.items():
            if number not in unknown and number in self._by_model(content):
                found[number] = self._by_model(content[:1]) + self._by_model(content[1:])
        return found

    def _by_model(self, word: str) -> list[int]:
        try:
            return [token.id for token in self._twin.model.tokenize(word)] if word else []
        except Exception:  # the tokenizers library raises plain Exception if it has no token for unknown words
            return []


def _copy(token: AddedToken, *, content: str, special: bool = False) -> AddedToken:
    return AddedToken(
        content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=special,
    )


def _twin(backend: Tokenizer, added: dict[int, AddedToken], controls: dict[str, int]) -> Tokenizer:
    """Return a copy of a tokenizer for which ``controls`` are special. Both share the large vocabulary."""
    twin = Tokenizer(backend.model)
    twin.normalizer = backend.normalizer
    twin.pre_tokenizer = backend.pre_tokenizer
    twin.post_processor = backend.post_processor
    tokens = {
        number: _copy(token, content=token.content, special=token.content in controls)
        for number, token in sorted(added.items())
    }
    twin.add_tokens(list(tokens.values()))
    if twin.get_added_tokens_decoder().keys() != added.keys():  # the numbers have gaps, which only a file can hold
        twin = Tokenizer.from_str(backend.to_str())
        twin.no_padding()
        twin.no_truncation()
        twin.add_special_tokens([token for token in tokens.values() if token.special])
    return twin


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")
