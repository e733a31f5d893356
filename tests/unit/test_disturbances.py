from __future__ import annotations

from cluster.control.disturbances import Disturbances
from cluster.control.ledger import Ledger


def test_a_death_costs_what_the_next_step_took_longer() -> None:
    ledger = Ledger()
    disturbances = Disturbances(ledger)
    for t in (0.0, 0.1, 0.2, 0.3):
        disturbances.stepped(t, 0, 64)
    disturbances.lost("actor_death", "expert-1", 0.36, 0.35, "killed")
    disturbances.stepped(1.0, 1, 64)
    disturbances.stepped(1.1, 0, 64)
    (entry,) = ledger.entries()
    assert round(entry.stall_s, 6) == 0.6
    assert (entry.steps_replayed, entry.tokens_recomputed, entry.updates_lost) == (1, 64, 0)
    assert entry.recovered_s is None, "a copy is missing still"
    disturbances.whole(5.0)
    (entry,) = ledger.entries()
    assert entry.interruption_s == 5.0 - 0.35


def test_two_at_once_are_two_entries_and_close_together() -> None:
    ledger = Ledger()
    disturbances = Disturbances(ledger)
    disturbances.stepped(0.0, 0, 8)
    disturbances.stepped(1.0, 0, 8)
    for name in ("expert-0", "expert-1"):
        disturbances.lost("actor_death", name, 1.5, 1.5, "")
    disturbances.stepped(4.0, 2, 8)
    disturbances.whole(6.0)
    assert [(e.subject, e.stall_s, e.steps_replayed, e.recovered_s) for e in ledger.entries()] == [
        ("expert-0", 2.0, 2, 6.0),
        ("expert-1", 2.0, 2, 6.0),
    ]


def test_without_a_job_a_death_stalls_no_step() -> None:
    ledger = Ledger()
    disturbances = Disturbances(ledger)
    disturbances.stepped(0.0, 0, 8)
    disturbances.idle()
    disturbances.lost("frozen", "expert-0", 9.0, 4.0, "no answer")
    disturbances.stepped(100.0, 0, 8)
    disturbances.whole(101.0)
    (entry,) = ledger.entries()
    assert (entry.stall_s, entry.detection_s) == (0.0, 5.0)


def test_a_clock_that_is_set_back_costs_nothing() -> None:
    ledger = Ledger()
    disturbances = Disturbances(ledger)
    disturbances.stepped(100.0, 0, 8)
    disturbances.lost("actor_death", "expert-0", 100.5, 100.5, "")
    disturbances.stepped(50.0, 1, 8)
    assert ledger.entries()[0].stall_s == 0
