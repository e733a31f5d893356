"""What disturbances cost: how entries add up, what is kept of them, and the way to a file and back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.errors import InvalidInput
from cluster.control.ledger import KINDS, Entry, Ledger, Summary
from cluster.errors import NotFound


def test_an_entry_from_its_beginning_to_its_end() -> None:
    ledger = Ledger()
    number = ledger.open("frozen", "e1", 100.0, detected_s=105.5, message="no answer")
    ledger.add(number, stall_s=1.5, steps_replayed=1, tokens_recomputed=2048)
    ledger.add(number, stall_s=0.5, tokens_recomputed=2, requests_delayed=3, requests_failed=1, updates_lost=4)
    ledger.add(number, message="a copy took over")
    assert ledger.entries()[0].interruption_s is None
    ledger.close(number, 107.0)
    (entry,) = ledger.entries()
    assert entry == Entry(
        number=1,
        kind="frozen",
        subject="e1",
        started_s=100.0,
        detected_s=105.5,
        recovered_s=107.0,
        stall_s=2.0,
        steps_replayed=1,
        tokens_recomputed=2050,
        updates_lost=4,
        requests_delayed=3,
        requests_failed=1,
        message="no answer; a copy took over",
    )
    assert (entry.detection_s, entry.interruption_s) == (5.5, 7.0)


def test_it_ends_once_and_costs_may_come_late() -> None:
    ledger = Ledger()
    number = ledger.open("drain", "n1", 1.0)
    ledger.close(number, 2.0)
    ledger.close(number, 9.0)
    ledger.add(number, requests_failed=1)
    (entry,) = ledger.entries()
    assert (entry.recovered_s, entry.requests_failed, entry.detection_s) == (2.0, 1, None)


def test_a_clock_that_was_set_back_costs_nothing() -> None:
    ledger = Ledger()
    number = ledger.open("actor_death", "e0", 100.0, detected_s=90.0)
    ledger.add(number, stall_s=-3.0, steps_replayed=-1)
    ledger.close(number, 40.0)
    (entry,) = ledger.entries()
    assert (entry.detection_s, entry.interruption_s, entry.stall_s, entry.steps_replayed) == (0.0, 0.0, 0.0, 0)
    assert entry.recovered_s == 40.0, "as the clock said"
    assert ledger.summary()["actor_death"] == Summary(1, 0, 0.0, 0.0)


def test_the_oldest_entries_are_dropped() -> None:
    ledger = Ledger(max_entries=2)
    for number in range(1, 5):
        assert ledger.open("rebalance", "groups", float(number)) == number
    assert [entry.number for entry in ledger.entries()] == [3, 4]
    assert [entry.number for entry in ledger.entries(after=3)] == [4]
    assert ledger.entries(after=4) == ()
    ledger.add(1, requests_failed=1)
    ledger.close(2, 9.0)
    assert [entry.number for entry in ledger.entries()] == [3, 4]


def test_what_cannot_be() -> None:
    ledger = Ledger()
    ledger.open("rebalance", "groups", 1.0)
    for number in (0, 2, -1):
        with pytest.raises(NotFound, match=f"no entry {number} in the ledger, the last is 1"):
            ledger.close(number, 2.0)
        with pytest.raises(NotFound):
            ledger.add(number)
    with pytest.raises(
        InvalidInput, match=r"kind: is no kind of disturbance \(got 'flood'\); use one of actor_death, "
    ):
        ledger.open("flood", "n1", 1.0)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="max_entries: is below 1"):
        Ledger(0)


def test_the_summary_of_each_kind() -> None:
    ledger = Ledger()
    assert ledger.summary() == {}
    for seconds in (2.0, 9.0, 4.0):
        ledger.close(ledger.open("node_death", "n1", 10.0), 10.0 + seconds)
    ledger.open("node_death", "n2", 50.0)
    ledger.open("drain", "n3", 60.0)
    assert ledger.summary() == {"node_death": Summary(4, 1, 4.0, 9.0), "drain": Summary(1, 1, None, None)}


# --- To a file and back ------------------------------------------------------------------------------------------

TIMES = st.floats(-1e10, 1e10)
COUNTS = st.integers(0, 2**60)
OPENS = st.tuples(st.just("open"), st.fixed_dictionaries({"kind": st.sampled_from(KINDS), "subject": st.text()}), TIMES)
ADDS = st.tuples(
    st.just("add"),
    st.fixed_dictionaries(
        {},
        optional={
            "stall_s": st.floats(0, 1e6),
            "steps_replayed": COUNTS,
            "tokens_recomputed": COUNTS,
            "updates_lost": COUNTS,
            "requests_delayed": COUNTS,
            "requests_failed": COUNTS,
            "message": st.text(),
        },
    ),
    st.integers(1, 10),
)
CLOSES = st.tuples(st.just("close"), TIMES, st.integers(1, 10))


@given(st.lists(OPENS | ADDS | CLOSES, max_size=30), st.integers(1, 6))
@settings(max_examples=200, deadline=None)
def test_every_ledger_survives_the_way_to_a_file_and_back(operations: list[Any], max_entries: int) -> None:
    ledger = Ledger(max_entries)
    opened = 0
    for name, values, last in operations:
        if name == "open":
            opened = ledger.open(**values, now=last, detected_s=last if opened % 2 else None)
        elif opened and name == "add":
            ledger.add(max(1, opened + 1 - last), **values)
        elif opened:
            ledger.close(max(1, opened + 1 - last), values)
    again = Ledger.from_json(ledger.to_json(), max_entries)
    assert again.entries() == ledger.entries()
    assert again.to_json() == ledger.to_json()
    assert again.open("drain", "n", 0.0) == opened + 1, "numbers go on"


def written(**changes: object) -> str:
    ledger = Ledger()
    ledger.open("drain", "n1", 1.0)
    ledger.open("frozen", "e1", 2.0, detected_s=3.0)
    content = json.loads(ledger.to_json())
    content["entries"][1].update(changes)
    return json.dumps(content)


def test_a_smaller_ledger_keeps_the_newest() -> None:
    assert [entry.number for entry in Ledger.from_json(written(), max_entries=1).entries()] == [2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "flood"}, r"ledger\.entries\[1\]\.kind: is no kind of disturbance \(got 'flood'\)"),
        ({"kind": 1}, r"entries\[1\]\.kind: is not of type str"),
        ({"number": 1}, r"entries\[1\]\.number: is out of order"),
        ({"started_s": None}, r"entries\[1\]\.started_s: is not of type float"),
        ({"detected_s": "soon"}, r"entries\[1\]\.detected_s: is not of type NoneType or float"),
        ({"recovered_s": float("nan")}, r"entries\[1\]\.recovered_s: is not finite"),
        ({"started_s": 10**400}, r"entries\[1\]\.started_s: is not finite"),
        ({"stall_s": -1.0}, r"entries\[1\]\.stall_s: is below 0"),
        ({"steps_replayed": True}, r"entries\[1\]\.steps_replayed: is not of type int"),
        ({"steps_replayed": 1.0}, r"entries\[1\]\.steps_replayed: is not of type int"),
        ({"requests_failed": -1}, r"entries\[1\]\.requests_failed: is below 0"),
        ({"extra": 1}, r"entries\[1\]: misses or adds a field \(got \['extra'\]\)"),
    ],
)
def test_an_entry_that_was_never_written_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Ledger.from_json(written(**changes))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "ledger: is not JSON"),
        ("[" * 100_000, "ledger: is not JSON"),
        ("[]", r"ledger: is not a JSON object \(got 'list'\)"),
        ("{}", "ledger: is not a ledger"),
        ('{"format": 2, "entries": []}', r"ledger\.format: is not 1 \(got 2\)"),
        ('{"format": 1, "entries": {}}', r"ledger\.entries: is not a list"),
        ('{"format": 1, "entries": [5]}', r"ledger\.entries\[0\]: is not a JSON object"),
        ('{"format": 1, "entries": [], "more": 0}', "ledger: is not a ledger"),
    ],
)
def test_a_file_that_is_no_ledger_is_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Ledger.from_json(text)


def test_whole_seconds_are_times_too() -> None:
    entry = Ledger.from_json(written(started_s=7)).entries()[1]
    assert type(entry.started_s) is float


def test_every_kind_can_be_opened() -> None:
    ledger = Ledger()
    for kind in KINDS:
        ledger.open(kind, "x", 0.0)
    assert [entry.kind for entry in ledger.entries()] == list(KINDS)
    assert list(ledger.summary()) == list(KINDS)
