from __future__ import annotations

from cluster.control.orphans import Silence


def test_silence_adds_up_until_somebody_asks() -> None:
    silence = Silence(10.0, most_a_look_s=2.0)
    assert [silence.look(11.0), silence.look(12.0)] == [1.0, 2.0]
    silence.heard()
    assert [silence.look(13.0), silence.look(14.0)] == [0.0, 1.0]


def test_time_in_which_the_process_did_not_run_counts_for_little() -> None:
    silence = Silence(0.0, most_a_look_s=2.0)
    assert silence.look(100.0) == 2.0
    assert silence.look(99.0) == 2.0, "a clock that goes back counts for nothing"
