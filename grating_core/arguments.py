"""These checks accept texts and numbers in the forms of other libraries, and refuse anything ambiguous."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import suppress
from numbers import Real
from typing import Any, Literal, get_args

Guarantee = Literal["share", "set"]
"""What a target counts: the mean share of the top K that is kept, or the requests whose whole top K is kept."""

LongDocuments = Literal["truncate", "windows"]
"""What happens to a document that does not fit: its end is cut, or its best window gives its score."""

Scores = Literal["exact", "estimated"]
"""Whether what is returned went through every layer, or sure winners stop early with an estimate."""

INPUTS_PREFERENCE, PRODUCTS_PREFERENCE = 0.9, 0.7
"""What counts of an input, and of a product, whose columns are not in memory, unless the user says otherwise."""

_UNITS = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def whole_number(name: str, value: Any, least: int = 1) -> int:
    """Return a whole number of any type, including numpy's, as an int.

    Raises:
        ValueError: The value is something else, or below ``least``.
    """
    try:
        found = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = None
    if found is None or found < least:
        raise ValueError(f"{name}={value!r} must be a whole number, {least} or more")
    return found


def parse_size(text: str) -> int:
    """Return the bytes of a size with a unit, such as ``"300MB"`` or ``"1.5 GiB"``, in large or small letters.

    Raises:
        ValueError: The text is something else, or below 0.
    """
    size = text.strip().upper()
    with suppress(ValueError, OverflowError):  # infinity is no whole number
        for unit, factor in _UNITS.items():
            number = size.removesuffix(unit)
            if number != size and (found := int(float(number) * factor)) >= 0:
                return found
    raise ValueError(f"{text!r} is not a size such as '300MB' or '1.5GiB'")


def parse_budget(memory_budget: str | int) -> int:
    """Return the bytes of a memory budget: a number of bytes, or a string such as ``"300MB"`` or ``"1.5GiB"``.

    Raises:
        ValueError: The budget has another form, or is not above 0.
    """
    try:
        if isinstance(memory_budget, bool):
            raise ValueError
        if isinstance(memory_budget, str):
            size = memory_budget.strip()
            found = int(size) if size.isdigit() else parse_size(size)
        else:
            found = operator.index(memory_budget)  # this takes numpy's numbers as well
        if found < 1:
            raise ValueError
    except (ValueError, TypeError):
        raise ValueError(
            f"memory_budget={memory_budget!r} must be a number of bytes above 0, a size such as '300MB' or "
            f"'1.5GiB', or None, which keeps everything in memory"
        ) from None
    return found


def is_number(value: Any) -> bool:
    """Tell whether a value is a finite real number of any type, including numpy's."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    return -math.inf < float(value) < math.inf


def is_one_of(names: Any, value: Any) -> bool:
    """Tell whether a value, of any type, is one of the names that a ``Literal`` allows."""
    return isinstance(value, str) and value in get_args(names)


def given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings without those that are None, which means that they are not given."""
    return {name: value for name, value in settings.items() if value is not None}


def check_density(mlp_density: Any) -> float:
    """Return the density, if it is one; see :func:`check_share`."""
    what = "the share of the MLPs' weights that a token uses; None for all"
    return check_share("mlp_density", mlp_density, what)


def check_preference(name: str, preference: Any) -> float:
    """Return a preference for columns in memory, if it is one; see :func:`check_share`."""
    what = "what counts of a magnitude whose column is not in memory; 1 prefers no column"
    return check_share(name, preference, what)


def check_share(name: str, share: Any, what: str) -> float:
    """Return a share, if it is one.

    Args:
        name: The name of the argument.
        share: The argument.
        what: What the share means, in words.

    Raises:
        ValueError: The share is not a number above 0 and at most 1.
    """
    if not is_number(share) or not 0 < share <= 1:
        raise ValueError(f"{name}={share!r} must be a number above 0, 1 at most: {what}")
    return float(share)


def check_bits(name: str, bits: Any, possible: Sequence[int], what: str) -> None:
    """Raise ``ValueError`` for a number of bits that is not possible, if it is given.

    Args:
        name: The name of the argument.
        bits: The argument.
        possible: The values that are possible, beside None.
        what: What has so many bits, in words.
    """
    if bits is not None and (isinstance(bits, bool) or not is_number(bits) or bits not in possible):
        these = " or ".join(map(str, possible))
        raise ValueError(f"{name}={bits!r} must be {these}, {what}, or None to leave them as they are")


def check_target(target: Any) -> None:
    """Raise ``ValueError`` for a target that is not a number between 0 and 1."""
    if not is_number(target) or not 0 < target < 1:
        raise ValueError(f"target={target!r} must be a number between 0 and 1, such as 0.98")


def check_threshold(score_threshold: Any, *, raw_scores: bool, scores: str) -> None:
    """Check the score below which documents are left out.

    Args:
        score_threshold: The threshold; None for none.
        raw_scores: Whether it is a raw score, and no probability.
        scores: ``"exact"`` or ``"estimated"``.

    Raises:
        ValueError: It is no finite number, or no probability, or the scores are estimates, whose level may be off.
    """
    if score_threshold is None:
        return
    told = f"score_threshold={score_threshold!r}"
    if not is_number(score_threshold):
        raise ValueError(f"{told} must be a finite number; None leaves nothing out")
    if not raw_scores and not 0 <= score_threshold <= 1:
        raise ValueError(
            f"{told} must be a probability from 0 to 1, unless raw_scores are asked for, which may be any number"
        )
    if scores == "estimated":
        raise ValueError(
            f"{told} and scores='estimated' exclude each other: the level of an estimate may be off. Use "
            f"scores='exact'"
        )


def check_deadline(deadline: Any) -> None:
    """Raise ``ValueError`` for a deadline that is neither a number of seconds above 0 nor None."""
    if deadline is not None and (not is_number(deadline) or deadline <= 0):
        raise ValueError(
            f"deadline={deadline!r} must be a number of seconds above 0, such as 0.25; None sets no deadline"
        )


def check_query(query: str) -> None:
    """Raise ``ValueError`` for a query that is not a string, or blank."""
    if not isinstance(query, str) or not query.strip():
        raise ValueError(f"query={query!r} must be a string that is not empty")


def texts(name: str, value: Iterable[str], wanted: str = "a list of strings") -> list[str]:
    """Return the texts in a list, tuple, array, series or generator.

    Args:
        name: The argument's name.
        value: The argument.
        wanted: The words for what it must be.

    Raises:
        ValueError: The argument is something else, has no order, or has an element that is not a string.
    """
    found = elements(name, value, wanted, values="{name}.values()")
    for index, text in enumerate(found):
        if not isinstance(text, str):
            raise ValueError(f"{name}[{index}] is a {type(text).__name__}, not a string")
    return found


def pairs(name: str, value: Iterable[Any]) -> list[tuple[str, str]]:
    """Return the pairs of texts in a list, an array with two columns, a zip or another generator.

    Raises:
        ValueError: The argument is something else; or one pair is not a query and a text.
    """
    found = elements(name, value, "a list of pairs of query and text", values="{name}.items()")
    for index, pair in enumerate(found):
        if not _is_pair(pair):
            raise ValueError(f"{name}[{index}]={pair!r} must be a query that is not empty and a text")
    return [(pair[0], pair[1]) for pair in found]


def elements(name: str, value: Any, wanted: str, *, values: str) -> list[Any]:
    """Return what is in a list, tuple, array, series or generator.

    Args:
        name: The argument's name.
        value: The argument.
        wanted: The words for what it must be.
        values: The code that takes the wanted part of a mapping, for the message.

    Raises:
        ValueError: The argument is a text, a mapping, a set, a data frame, or holds nothing.
    """
    kind = type(value).__name__
    advice = ""
    if isinstance(value, str):
        advice = f"; write [{name}] for a single one"
    elif isinstance(value, Mapping):
        advice = f", whose keys would be taken; write list({values.format(name=name)})"
    elif isinstance(value, Set):
        advice = f", which has no order to count in; write sorted({name})"
    elif hasattr(value, "columns"):
        advice = f", whose columns would be taken; write {name}['text'].tolist() with the column's name"
    elif not isinstance(value, bytes | bytearray | memoryview):
        try:
            return list(value)
        except TypeError as error:
            if hasattr(value, "__next__"):  # the error comes from the caller's iterator
                raise
            advice = f" ({error})" if hasattr(value, "__iter__") else ""
    raise ValueError(f"{name} must be {wanted}, not a {kind}{advice}")


def _is_pair(pair: Any) -> bool:
    try:
        if isinstance(pair, str | Set | Mapping) or len(pair) != 2:
            return False
        query, text = pair
    except TypeError:
        return False
    return isinstance(query, str) and isinstance(text, str) and bool(query.strip())
