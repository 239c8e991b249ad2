"""Sentences cover a text, and end where a reader would say so."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grating_core.text.sentences import sentences


def parts(text: str) -> list[str]:
    return [text[start:stop].strip() for start, stop in sentences(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It rains today. The sun shines tomorrow!", ["It rains today.", "The sun shines tomorrow!"]),
        ('He said "I will come." Nobody came.', ['He said "I will come."', "Nobody came."]),
        ("Flow of 3.5 m/s, i.e. slow. It stays so.", ["Flow of 3.5 m/s, i.e. slow.", "It stays so."]),
        ("the flow is laminar . it stays so everywhere .", ["the flow is laminar .", "it stays so everywhere ."]),
        ("J. R. Smith wrote this report.", ["J. R. Smith wrote this report."]),
        ("\u96e8" * 14 + "\u3002" + "\u5929" * 9, ["\u96e8" * 14 + "\u3002", "\u5929" * 9]),
        ("A first paragraph\n\nA second paragraph", ["A first paragraph", "A second paragraph"]),
        ("What to buy:\n- a loaf of bread\n- two eggs", ["What to buy:", "- a loaf of bread", "- two eggs"]),
        ("no end at all", ["no end at all"]),
        ("", []),
        (" \n ", []),
    ],
)  # fmt: skip
def test_sentences(text: str, expected: list[str]) -> None:
    assert parts(text) == expected


@pytest.mark.parametrize(
    "text",
    [". " * 200_000, "." * 400_000, " " * 400_000, "\n" * 400_000, "a.\n" * 100_000, ("\n" + " " * 50) * 8_000],
)
def test_a_long_text_of_one_kind_takes_no_time(text: str) -> None:
    # What grows with the square would take hours here.
    found = sentences("Here it begins." + text)
    assert found[0][0] == 0
    assert found[-1][1] == 15 + len(text)


@given(st.text(alphabet='aB .!?\n。-"', max_size=200))
def test_sentences_cover_a_text_in_order(text: str) -> None:
    found = sentences(text)
    assert "".join(text[start:stop] for start, stop in found) == (text if text.strip() else "")
    assert all(text[start:stop].strip() for start, stop in found)
