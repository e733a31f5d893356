"""Which nodes leave, and which is emptied next."""

from __future__ import annotations

import pytest

from actors.errors import InvalidInput
from cluster.control.draining import AGAIN_S, DEFAULT_NOTICE_S, LEAST_NOTICE_S, Leaving, Notice, find_node
from cluster.errors import FailedPrecondition

NODES = {"aa": "head", "bb": "node-1", "cc": "node-2"}


class TestFindNode:
    def test_by_name_and_by_id(self) -> None:
        assert find_node("node-1", NODES, {}) == "bb"
        assert find_node("cc", NODES, {}) == "cc"

    def test_an_unknown_one_is_told_with_those_there_are(self) -> None:
        with pytest.raises(InvalidInput, match=r"'node-7'.*head, node-1, node-2") as caught:
            find_node("node-7", NODES, {})
        assert caught.value.field == "node"

    def test_a_name_that_two_nodes_have_is_no_name(self) -> None:
        with pytest.raises(InvalidInput, match="bb, dd"):
            find_node("node-1", {**NODES, "dd": "node-1"}, {})
        assert find_node("dd", {**NODES, "dd": "node-1"}, {}) == "dd"

    def test_a_node_with_what_cannot_be_moved_is_refused_by_name(self) -> None:
        with pytest.raises(FailedPrecondition, match="node head holds the router"):
            find_node("head", NODES, {"aa": "the router"})


class TestNotice:
    def test_seconds_that_are_left(self) -> None:
        assert Notice("bb", 130.0).deadline_s(now=100.0) == 30.0
        assert Notice("bb", None).deadline_s(now=100.0) == DEFAULT_NOTICE_S

    def test_a_deadline_that_is_over_still_leaves_time_for_a_try(self) -> None:
        assert Notice("bb", 90.0).deadline_s(now=100.0) == LEAST_NOTICE_S


class TestLeaving:
    def test_news_are_told_once(self) -> None:
        leaving = Leaving()
        assert leaving.announced({"bb": 50.0}, NODES, 0.0) == ["bb"]
        assert leaving.announced({"bb": 50.0, "cc": None}, NODES, 0.0) == ["cc"]
        assert leaving.names == {"bb": "node-1", "cc": "node-2"}

    def test_who_is_gone_or_stays_after_all_is_forgotten(self) -> None:
        leaving = Leaving()
        leaving.announced({"bb": 50.0, "cc": None}, NODES, 0.0)
        leaving.announced({"bb": 50.0}, {"aa": "head", "cc": "node-2"}, 0.0)
        assert leaving.names == {}
        assert leaving.next({"bb": 1, "cc": 1}, 0.0) is None
        assert leaving.announced({"bb": 60.0}, NODES, 0.0) == ["bb"], "it is back, and leaves again"

    def test_what_was_asked_for_leaves_until_it_is_taken_back_or_gone(self) -> None:
        leaving = Leaving()
        leaving.ask("bb", "node-1", 1.0)
        leaving.announced({}, NODES, 0.0)
        assert leaving.names == leaving.asked == {"bb": "node-1"}
        leaving.take_back("bb")
        assert leaving.names == leaving.asked == {}
        leaving.ask("bb", "node-1", 1.0)
        leaving.announced({}, {"aa": "head"}, 2.0)
        assert leaving.names == {}

    def test_a_node_that_joined_after_the_look_is_not_taken_for_gone(self) -> None:
        leaving = Leaving()
        leaving.ask("dd", "node-3", 5.0)
        for _ in range(2):  # the same news are looked at again and again
            leaving.announced({}, NODES, 4.9)
            assert leaving.names == leaving.asked == {"dd": "node-3"}
        leaving.announced({}, {**NODES, "dd": "node-3"}, 5.5)
        assert leaving.asked == {"dd": "node-3"}
        leaving.announced({}, NODES, 6.5)
        assert leaving.names == leaving.asked == {}

    def test_what_ray_announced_is_not_taken_back(self) -> None:
        leaving = Leaving()
        leaving.announced({"bb": None}, NODES, 0.0)
        leaving.ask("bb", "node-1", 1.0)
        leaving.take_back("bb")
        assert leaving.names == {"bb": "node-1"}
        assert leaving.asked == {}

    def test_the_one_that_ends_first_is_next_if_it_holds_something(self) -> None:
        leaving = Leaving()
        leaving.announced({"aa": 20.0, "bb": 50.0, "cc": None}, NODES, 0.0)
        assert leaving.next({"bb": 2, "cc": 1}, 0.0) == Notice("bb", 50.0)
        assert leaving.next({"bb": 0, "cc": 1}, 0.0) == Notice("cc", None)
        assert leaving.next({}, 0.0) is None

    def test_an_attempt_is_followed_by_a_pause_and_has_an_id_of_its_own(self) -> None:
        leaving = Leaving()
        leaving.announced({"bb": 50.0}, NODES, 0.0)
        first = leaving.tried("bb", 10.0)
        assert leaving.next({"bb": 1}, 10.0 + AGAIN_S / 2) is None
        assert leaving.next({"bb": 1}, 10.0 + AGAIN_S) == Notice("bb", 50.0)
        assert leaving.tried("bb", 10.0 + AGAIN_S) != first

    def test_what_was_asked_for_is_nothing_to_begin_by_itself(self) -> None:
        leaving = Leaving()
        leaving.ask("bb", "node-1", 1.0)
        leaving.announced({}, NODES, 0.0)
        assert leaving.next({"bb": 1}, 0.0) is None
