"""Configs compared value by value."""

from __future__ import annotations

from actors.differences import first_difference, leaves


def test_leaves_are_told_by_their_paths() -> None:
    assert dict(leaves({"a": {"b": 1, "c": {"d": None}}, "e": {}, "f": [2]})) == {
        "a.b": 1,
        "a.c.d": None,
        "e": {},
        "f": [2],
    }


def test_the_first_difference_is_that_of_the_first_mapping_s_order() -> None:
    assert first_difference({"a": 1, "b": 2, "c": 3}, {"c": 4, "b": 5, "a": 1}) == "b"
    assert first_difference({"a": 1}, {"a": 1, "z": 0}) == "z"
    assert first_difference({"a": 1, "n": None}, {"a": 1}) is None, "what is missing counts as None"
