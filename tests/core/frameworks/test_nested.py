"""Nested values are walked without recursion."""

import threading
from collections import OrderedDict

from grating_core.frameworks.nested import copied, strings


def nested(value, depth):
    for level in range(depth):
        value = [value] if level % 2 else {"in": value}
    return value


def test_strings_in_their_order():
    value = {"b": ["x", {"z": "y", "a": ("w", 3, None, b"no")}], "a": "v"}
    assert list(strings(value)) == ["x", "y", "w", "v"]
    assert list(strings(value, by_key=True)) == ["v", "x", "w", "y"]
    assert list(strings("x")) == ["x"]
    assert list(strings(3)) == []
    assert list(strings(nested("x", 200_000))) == ["x"]


def test_what_is_there_twice_is_read_twice_and_what_holds_itself_once():
    twice = ["x"]
    assert list(strings([twice, twice])) == ["x", "x"]
    twice.append(twice)
    assert list(strings(twice)) == ["x"]


def test_copies_share_nothing_that_can_change():
    lock = threading.Lock()
    value = {"a": [{"b": [1]}], "c": OrderedDict(d=[2]), "lock": lock, "set": {3}, "tuple": ([4],)}
    value["self"] = value
    copy = copied(value)
    copy["a"][0]["b"].append(9)
    copy["c"]["d"].append(9)
    copy["set"].add(9)
    copy["tuple"][0].append(9)
    assert (value["a"], value["c"], value["set"], value["tuple"]) == ([{"b": [1]}], {"d": [2]}, {3}, ([4],))
    assert copy["lock"] is lock
    assert copy["self"] is copy
    assert type(copy["c"]) is OrderedDict


def test_copies_of_what_is_nested_deeply():
    copy = copied(nested(["x"], 200_000))
    assert list(strings(copy)) == ["x"]
