"""What `bench scale` makes of the tokens that its streams get."""

from __future__ import annotations

from cluster.bench.scale import Streams


def test_a_stream_that_waits_for_its_next_token_counts_before_it_gets_it() -> None:
    clock = [0.0]
    streams = Streams(2, now=lambda: clock[0])
    for moment in (1.0, 4.0, 5.0):
        clock[0] = moment
        streams.token(0)
    streams.end(failed=True)
    clock[0] = 7.0
    seen = streams.take()
    assert seen.gaps_s == [3.0, 7.0], "between tokens of the first; the second had none yet"
    assert (seen.ended, seen.failed) == (0, 1)
    clock[0] = 8.0
    streams.token(1)
    seen = streams.take()
    assert seen.gaps_s == [3.0, 8.0], "a gap that began before counts as a whole"
    assert (seen.ended, seen.failed) == (0, 0), "what was taken is not told again"
