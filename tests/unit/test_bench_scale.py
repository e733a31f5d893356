"""What `bench scale` makes of the tokens that its streams get."""

from __future__ import annotations

from cluster.backend import Operation, OperationState
from cluster.bench.scale import NUM_STREAMS, Seen, Streams, counts_of, for_streams, rows_of
from cluster.configfile import find_config, load_cluster


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


def test_a_way_is_compared_with_the_slower_of_the_times_before_and_after_it() -> None:
    """More actors on the same cores make every token slower, which is not the change's doing."""
    operation = Operation(
        "operation-1", "r", "scale_experts", OperationState.SUCCEEDED, 8, 1.0, "", 0.0, prepare_s=9.0, stall_s=0.05
    )
    before, after = Seen([0.5, 0.6], 4, 1), Seen([0.9, 1.0], 3, 2)
    rows = {row.case: row for row in rows_of(4, 8, operation, Seen([1.0, 1.25], 7, 1), (before, after))}
    assert rows["up_stall_4_to_8"].value == 50
    assert rows["up_prepare_4_to_8"].value == 9
    gap, median_gap = rows["stream_gap_4_to_8"], rows["stream_gap_median_4_to_8"]
    assert (gap.value, gap.peer_value, gap.ratio) == (1250, 1000, 0.8)
    assert (median_gap.value, median_gap.peer_value) == (1125, 950)
    failed = rows["failed_requests_4_to_8"]
    assert (failed.value, failed.unit) == (3, "of 13"), "those that failed right after it are the change's too"


def test_streams_share_forwards_unless_the_config_says_how_many_do() -> None:
    config = find_config("local_cpu")
    assert for_streams(load_cluster(config)).router.decode_batch == NUM_STREAMS
    assert for_streams(load_cluster(config, {"router.decode_batch": 1})).router.decode_batch == 1
    assert load_cluster(config).router.max_sessions >= NUM_STREAMS, "more of them would wait"


def test_every_way_leads_to_another_number_of_actors() -> None:
    assert counts_of(2, (3, 2), 2) == [2, 3, 2, 3, 2]
    assert counts_of(4, (8, 6), 2) == [4, 8, 6, 4, 8, 6]
