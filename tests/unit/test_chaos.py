"""The pure parts of the fault benchmark: its schedule, its figures, its picture."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest

from actors.errors import InvalidInput
from actors.expert.updates import Brake
from actors.staleness import MAX_STALENESS
from cluster.backend import ActorStatus, ClusterStatus, Job, JobEvent, JobState
from cluster.chaos import report
from cluster.chaos.channels import num_channels
from cluster.chaos.picture import degraded, draw_timeline, longest_wait_s
from cluster.chaos.record import Commit, Gap, Look, Record, Request, Span, Strike, Vitals
from cluster.chaos.run import Settings, _Disturbed, is_exact
from cluster.chaos.schedule import (
    DEFAULT_KINDS,
    KINDS,
    Fault,
    Kind,
    faults,
    scale_target,
    victims,
    what_is_missing,
)
from cluster.chaos.service import ServiceProcess, counts
from cluster.chaos.strikes import Freezer
from cluster.chaos.work import Watched
from cluster.commands.chaos import JOB, cluster_config, duration, job_config, kinds, phases, show
from cluster.commands.output import plain
from cluster.configfile import find_config, load_cluster
from cluster.control.ledger import Entry
from cluster.fabric.workertools import brake_of


def actor(number: int, node: str = "", state: str = "ready", role: str = "expert") -> ActorStatus:
    node = node or f"node-{number + 1}"
    return ActorStatus(f"{role}-{number}", role, node, 1000 + number, state, "cpu", 0)


def status(*actors: ActorStatus, ready: bool = True, message: str = "") -> ClusterStatus:
    return ClusterStatus("m", 1, 8, 2, 2, 0, 0, {}, 1, (), actors, (), {}, ready, message)


# --- Schedule ----------------------------------------------------------------------------------------------------


def first(count: int, seed: int = 0, mtbf_s: float = 20.0, min_gap_s: float = 5.0) -> list[Fault]:
    return list(itertools.islice(faults(seed, mtbf_s, min_gap_s, DEFAULT_KINDS), count))


def test_a_seed_gives_the_same_faults() -> None:
    assert first(50) == first(50)
    assert first(50) != first(50, seed=1)
    assert [fault.number for fault in first(3)] == [1, 2, 3]


def test_gaps_have_the_mean_that_was_asked_for_and_none_is_too_small() -> None:
    gaps = [fault.gap_s for fault in first(4000)]
    assert min(gaps) >= 5
    assert fmean(gaps) == pytest.approx(20, rel=0.05)
    assert {fault.gap_s for fault in first(20, mtbf_s=5)} == {5.0}


def test_every_kind_comes_once_a_round() -> None:
    found = first(40)
    for start in range(0, 40, 4):
        assert {fault.kind for fault in found[start : start + 4]} == set(DEFAULT_KINDS)


@pytest.mark.parametrize(("mtbf_s", "min_gap_s", "chosen"), [(20, 21, ("kill",)), (0, 0, ("kill",)), (20, 5, ())])
def test_schedules_that_cannot_be_are_refused(mtbf_s: float, min_gap_s: float, chosen: tuple[Kind, ...]) -> None:
    with pytest.raises(InvalidInput):
        faults(0, mtbf_s, min_gap_s, chosen)


def test_victims() -> None:
    router = actor(0, role="router")
    here = status(actor(1), router, actor(0), actor(2, "node-1"), actor(3, state="lost"))
    assert [a.id for a in victims(Fault(1, "kill", 5, 0.0), here)] == ["expert-0"]
    assert [a.id for a in victims(Fault(1, "freeze", 5, 0.99), here)] == ["expert-2"]
    assert [a.id for a in victims(Fault(1, "node", 5, 0.0), here)] == ["expert-0", "expert-2"]
    assert victims(Fault(1, "scale", 5, 0.5), here) == ()
    assert victims(Fault(1, "coordinator", 5, 0.5), here) == ()
    assert [a.id for a in victims(Fault(1, "cut", 5, 0.5), here)] == ["expert-1"]
    assert victims(Fault(1, "kill", 5, 0.5), status(router)) == ()


def test_any_router_may_be_hit() -> None:
    routers = actor(1, role="router"), actor(0, role="router"), actor(2, role="router", state="lost")
    here = status(*routers, actor(0))
    assert [a.id for a in victims(Fault(1, "router", 5, 0.0), here)] == ["router-0"]
    assert [a.id for a in victims(Fault(1, "router", 5, 0.99), here)] == ["router-1"]
    assert victims(Fault(1, "router", 5, 0.5), status(actor(0))) == ()


def test_scaling_goes_one_off_and_back() -> None:
    up, down = Fault(1, "scale", 5, 0.2), Fault(1, "scale", 5, 0.8)
    assert scale_target(up, 3, 3, 2, 8) == 4
    assert scale_target(down, 3, 3, 2, 8) == 2
    assert scale_target(up, 4, 3, 2, 8) == 3
    assert scale_target(down, 2, 3, 2, 8) == 3
    assert scale_target(down, 3, 3, 3, 8) == 4
    assert scale_target(up, 3, 3, 2, 3) == 2
    with pytest.raises(InvalidInput, match="impossible"):
        scale_target(up, 3, 3, 3, 3)


def test_a_cluster_that_has_not_noticed_is_not_whole() -> None:
    here = status(actor(0), actor(1), actor(2))
    assert what_is_missing(here, 3) == ""
    assert "expert-1 not missed" in what_is_missing(here, 3, {1001, 1009})
    dead, its_successor = actor(0, role="router"), replace(actor(0, role="router"), pid=77)
    assert "router-0 not missed" in what_is_missing(status(dead), 0, {dead.pid})
    assert what_is_missing(status(its_successor), 0, {dead.pid}) == ""
    assert what_is_missing(here, 4) == "3 of 4 expert actors"
    assert what_is_missing(replace(here, message="degraded: group 1"), 3) == "degraded: group 1"
    assert what_is_missing(replace(here, ready=False), 3) == "not ready"


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("ray::ExpertWorker", True),
        ("/x/ray/core/src/ray/raylet/raylet --raylet_socket_name=/tmp", True),
        ("/usr/bin/python -m cluster.cli up", True),
        ("ray::IDLE", False),
        ("/x/python -m ray.scripts.scripts start --block --address 1.2.3.4:5", False),
        ("/x/python -u /x/ray/_private/log_monitor.py --session-dir=/tmp", False),
    ],
)
def test_which_processes_must_not_become_more(title: str, expected: bool) -> None:
    assert counts(title) == expected


def test_updates_are_slowed_through_the_environment_of_the_whole_cluster(tmp_path: Path) -> None:
    cluster = load_cluster(find_config("local_cpu"))
    settings = Settings(cluster, JOB, tmp_path, 1, 1, 20, 5, ("kill",), 0, 1, slow_updates_s=0.25)
    assert brake_of(settings.environment).sleep_s == 0.25
    assert brake_of(replace(settings, slow_updates_s=0).environment) == Brake()


@pytest.mark.parametrize(("most", "expected"), [(0, (False, False)), (1, (True, True)), (2, (True, False))])
def test_a_phase_may_end_after_so_many_faults(tmp_path: Path, most: int, expected: tuple[bool, bool]) -> None:
    cluster = load_cluster(find_config("local_cpu"))
    settings = Settings(cluster, JOB, tmp_path, 1, 1, 20, 5, ("kill",), 0, 1, max_faults=most)
    run: Any = object.__new__(_Disturbed)
    run._settings, run._record = settings, a_run()
    assert (run._has_had_enough("training"), run._has_had_enough("serving")) == expected


def test_a_step_that_is_told_again_is_not_one_that_was_run_again() -> None:
    def event(step: int, time_s: float) -> JobEvent:
        return JobEvent(1, time_s, "step", JobState.RUNNING, step, {"loss": 3.0, "tokens": 8.0, "staleness_max": 2.0})

    told = [event(1, 10.0), event(2, 11.0), event(1, 9.9), event(2, 10.9), event(3, 15.0), event(2, 20.0)]
    client: Any = SimpleNamespace(watch_job=lambda job: (each for each in told))
    record = Record(2)
    Watched(client, Job("job-1", "", JOB, JobState.RUNNING, 0, 1.0), record)._thread.join(10)
    assert [(commit.step, commit.time_s) for commit in record.commits] == [(1, 10), (2, 11), (3, 15), (2, 20)]
    assert report.summary(record)["steps_replayed"] == 1
    assert report.summary(record)["staleness"]["max"] == 2


def test_who_took_the_place_of_a_dead_process_is_not_compared_with_it() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        service = ServiceProcess(other, "")
        first, second = (replace(actor(0, role="router"), pid=pid) for pid in (os.getpid(), other.pid))
        names = [set(service.vitals(status(router)).handles) for router in (first, second, first)]
        assert other.stdin is not None
        other.stdin.close()
    assert names == [{"front", "router"}, {"front", "router 2"}, {"front", "router"}]


# --- Figures -----------------------------------------------------------------------------------------------------


def commits(*times: float, tokens: int = 100) -> list[Commit]:
    return [Commit(time_s, step, 3.0, tokens, 0) for step, time_s in enumerate(times, 1)]


def a_run() -> Record:
    """Ten steps a second of 100 tokens; from second 10 on faults: a kill at 12 stops it for 1 s, a stall at 16 not."""
    times = [0.1 * n for n in range(1, 121)] + [13.0 + 0.1 * n for n in range(1, 71)]
    record = Record(base=2, commits=commits(*times), reference=Span(2.0, 10.0))
    record.spans = {"training": Span(10.0, 20.0), "serving": Span(20.0, 30.0)}
    record.strikes = [
        Strike(1, "training", "kill", "expert-0", 12.0, 0.0, 14.0),
        Strike(2, "training", "stall", "expert-1", 16.0, 1.5, 17.0),
        Strike(3, "serving", "kill", "expert-1", 22.0, 0.0, 24.0),
    ]
    record.gaps = [Gap("training", 0.1 * n, 0.1 * n + 0.1) for n in range(100)]
    record.gaps += [Gap("serving", 20.0, 20.2), Gap("serving", 20.2, 20.4), Gap("serving", 21.9, 24.1)]
    record.looks = [Look(0.5 * n, 1 if 12 <= 0.5 * n < 14 else 2, "x" * (12 <= 0.5 * n < 14)) for n in range(60)]
    record.undisturbed_losses = (3.0,) * 189 + (3.3,)
    record.requests = [
        Request("serving", 0, 20, 21, (1, 2, 3), ""),
        Request("serving", 1, 20, 21, (1, 9), ""),
        Request("serving", 1, 20, 21, (9,), "Unavailable: gone"),
    ]
    record.expected = {0: (1, 2, 3), 1: (1, 2, 3)}
    record.ledger = (Entry(1, "actor_death", "expert-0", 12.0, 12.4, 14.0, 1.0, 1, 100, 2),)
    before = Vitals(10, {"front": 0}, {"front": 0}, {"front": 40}, 20)
    record.calm = {"training": (before, Vitals(20, {"front": 0}, {"front": 0}, {"front": 43}, 21))}
    record.vitals = [
        Vitals(10.0 + n, {"front": 50_000_000 + n * 100_000}, {"front": 20_000_000 + n * 50_000}, {"front": 40}, 20)
        for n in range(11)
    ]
    return record


def test_interruptions_are_the_longest_waits_around_a_fault_less_the_usual() -> None:
    found = report.summary(a_run())
    assert found["interruption_s"]["kill"] == pytest.approx({"n": 1, "median": 1.0, "max": 1.0})
    assert found["interruption_s"]["stall"] == pytest.approx({"n": 1, "median": 0.0, "max": 0.0}, abs=1e-9)
    assert found["serving_interruption_s"]["kill"] == pytest.approx({"n": 1, "median": 2.0, "max": 2.0})
    assert found["recovery_s"]["kill"] == pytest.approx({"n": 2, "median": 2.0, "max": 2.0})
    assert found["usual"]["step_s"] == pytest.approx(0.1)


def test_a_job_that_never_goes_on_is_interrupted_to_the_end() -> None:
    record = Record(2, commits=commits(1.0, 2.0, 3.0), spans={"training": Span(0.0, 20.0)})
    record.strikes = [Strike(1, "training", "kill", "expert-0", 3.5, 0.0)]
    assert report.summary(record)["interruption_s"]["kill"]["max"] == pytest.approx(17.0)
    assert any("never whole again" in problem for problem in report.problems(record))


def test_a_wait_is_not_blamed_on_the_fault_before_it() -> None:
    record = Record(2, commits=commits(1.0, 2.0, 3.0, 4.0, 9.0), spans={"training": Span(0.0, 9.0)})
    record.strikes = [
        Strike(1, "training", "kill", "expert-0", 1.5, 0.0, 3.5),
        Strike(2, "training", "freeze", "expert-1", 3.8, 0.0, 8.9),
    ]
    found = report.summary(record)["interruption_s"]
    assert (found["kill"]["max"], found["freeze"]["max"]) == (1.0, 5.0)


def test_throughput_is_over_the_undisturbed_stretch_and_over_what_was_there() -> None:
    found = report.throughput(a_run())
    assert found["reference_tokens_per_s"] == pytest.approx(1000, rel=0.02)
    assert found["retained_throughput"] == pytest.approx(0.9, rel=0.02)
    assert found["capacity"] == pytest.approx(0.9, abs=0.02)
    assert found["retained_of_capacity"] == pytest.approx(1.0, rel=0.04)
    assert report.throughput(Record(2))["retained_throughput"] is None


def test_throughput_is_also_over_the_times_between_the_faults() -> None:
    """Others took half of the machine once the reference had been measured."""
    record = a_run()
    spans = report.calm_spans(record.strikes, record.spans["training"])
    assert spans == [Span(10.0, 12.0), Span(14.0, 16.0), Span(17.0, 20.0)]
    found = report.throughput(record)
    assert found["calm_tokens_per_s"] == pytest.approx(1000, rel=0.02)
    assert found["retained_of_calm"] == pytest.approx(found["retained_of_capacity"], rel=0.02)
    record.commits = [commit for commit in record.commits if commit.time_s <= 10 or commit.step % 2]
    halved = report.throughput(record)
    assert halved["retained_of_capacity"] == pytest.approx(found["retained_of_capacity"] / 2, rel=0.05)
    assert halved["retained_of_calm"] == pytest.approx(found["retained_of_calm"], rel=0.05)


def test_no_time_is_calm_while_the_cluster_is_not_whole() -> None:
    strikes = [
        Strike(2, "training", "freeze", "expert-1", 3.0, 0.0),
        Strike(1, "training", "kill", "expert-0", 1.0, 0.0, 2.5),
    ]
    assert report.calm_spans(strikes, Span(0.0, 9.0)) == [Span(0.0, 1.0), Span(2.5, 3.0)]
    assert report.calm_spans([], Span(0.0, 9.0)) == [Span(0.0, 9.0)]
    assert report.calm_spans([replace(strikes[1], started_s=9.5)], Span(0.0, 9.0)) == [Span(0.0, 9.0)]


def test_equality_lost_work_and_requests() -> None:
    found = report.summary(a_run())
    assert found["tokens_wrong"] == 2, "one that differs and one that is missing; what failed is counted as failed"
    assert found["requests"] == {"total": 3, "failed": 1}
    assert found["loss_rel_diff_max"] == pytest.approx(0.3 / 3.3)
    assert found["updates_lost"] == 2
    assert report.summary(Record(2))["tokens_wrong"] is None
    assert report.summary(Record(2))["loss_rel_diff_max"] is None


def test_what_was_due_when_a_fault_struck() -> None:
    waits = [Span(0.0, 1.0), Span(1.0, 2.0), Span(2.0, 5.0)]
    assert report.longest_due_s(waits, 0.4) == pytest.approx(1.0), "the one after it is longer"
    assert report.longest_due_s(waits, 1.4) == pytest.approx(3.0), "what was due came, what was next did not"
    assert report.longest_due_s(waits, 2.5) == pytest.approx(2.5)
    assert report.longest_due_s(waits, 9.0) is None


def test_the_next_step_and_the_next_token_of_each_request_that_a_fault_found_open() -> None:
    record = Record(2, commits=commits(1.0, 2.0, 5.5, 6.0), spans={"training": Span(0.0, 6.0)})
    record.strikes = [Strike(1, "training", "kill", "expert-0", 2.5, 0.0, 5.0)]
    record.gaps = [Gap("training", 2.4, 2.6, 0), Gap("training", 2.6, 3.4, 0), Gap("training", 2.0, 4.5, 1)]
    record.gaps += [Gap("training", 3.0, 9.0, 2), Gap("serving", 2.0, 9.0, 0)]
    found = report.summary(record)
    assert found["next_step_s"]["kill"] == pytest.approx({"n": 1, "median": 3.0, "max": 3.0})
    assert found["next_token_s"]["kill"] == pytest.approx({"n": 2, "median": 1.4, "max": 2.0}), "stream 2 began later"
    record.strikes = [replace(record.strikes[0], phase="serving")]
    assert report.summary(record)["next_step_s"] == {}


def test_a_bound_that_is_broken_and_updates_that_are_in_no_weights() -> None:
    record = Record(2, staleness=4, commits=commits(1.0, 2.0, 3.0))
    record.commits = [replace(commit, staleness=most) for commit, most in zip(record.commits, (0, 4, 1), strict=True)]
    record.updates_made = 3
    assert report.problems(record) == []
    assert report.summary(record)["staleness"]["max"] == 4
    record.commits[1] = replace(record.commits[1], staleness=5, merged=2)
    assert report.summary(record)["staleness"] == {
        "bound": 4,
        "max": 5,
        "mean_of_max": 2.0,
        "steps_beyond": 1,
        "merged_updates": 2,
    }
    assert report.problems(record) == ["1 steps were computed on experts that missed up to 5 updates, 4 are allowed"]
    record.commits[1] = replace(record.commits[1], staleness=4)
    record.updates_made = 1
    assert report.problems(record) == ["2 updates are in no weights, and the ledger has 0 as lost"]
    record.ledger = (Entry(1, "actor_death", "expert-0", 2.0, updates_lost=2),)
    assert report.problems(record) == []
    assert report.summary(record)["updates_missing"] == 2


def test_losses_of_an_asynchronous_job_are_compared_and_need_not_be_equal() -> None:
    record = Record(2, is_exact=True, commits=commits(1.0, 2.0), undisturbed_losses=(3.0, 3.1))
    found = report.summary(record)
    assert found["losses_must_be_equal"]
    assert any("losses differ" in problem for problem in found["problems"])
    assert report.problems(replace(record, is_exact=False)) == [], "a model with parts in float32"
    found = report.summary(replace(record, staleness=4))
    assert not found["losses_must_be_equal"]
    assert found["problems"] == []
    assert found["loss_rel_diff_max"] == pytest.approx(0.1 / 3.1)
    assert found["loss_rel_diff_mean"] == pytest.approx(3.0 / 3.1 - 1)


@pytest.mark.parametrize(
    ("dtype", "model", "expected"),
    [("float64", None, True), ("float32", None, False), ("float64", "tiny", False), ("float32", "exact", False)],
)
def test_losses_are_compared_exactly_where_all_of_the_model_is_in_float64(
    dtype: str, model: str | None, expected: bool
) -> None:
    args = argparse.Namespace(model=model, dtype=dtype, config="local_cpu", overrides=())
    assert is_exact(cluster_config(args)) is expected


def test_a_process_that_stands_still_is_not_there() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    freezer = Freezer()
    try:
        assert freezer.frozen == set()
        freezer.freeze(replace(actor(0), pid=process.pid), 60)
        assert freezer.frozen == {process.pid}
        freezer.close()
        assert freezer.frozen == set()
    finally:
        freezer.close()
        process.kill()
        process.wait(10)


def connection(pid: int | None, here: int, there: int, status: str = "ESTABLISHED", ip: str = "10.0.0.1") -> Any:
    ends = (SimpleNamespace(ip=ip, port=port) for port in (here, there))
    return SimpleNamespace(pid=pid, laddr=next(ends), raddr=next(ends), status=status)


def both(one: int | None, other: int | None, here: int, there: int) -> list[Any]:
    return [connection(one, here, there), connection(other, there, here, ip="::ffff:10.0.0.1")]


def test_connections_between_living_processes_of_the_cluster_are_told_apart() -> None:
    asked_both_ways = both(1, 2, 50, 60) + both(2, 1, 51, 61)
    assert num_channels(1, asked_both_ways, {1, 2}) == num_channels(2, asked_both_ways, {1, 2}) == 2
    assert num_channels(1, asked_both_ways + both(1, 3, 52, 62), {1, 2, 3}) == 3
    assert num_channels(1, asked_both_ways, {1}) == 0, "to a stranger"


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (both(1, 2, 52, 62), 2),  # a third one to the same
        ([connection(1, 52, 62)], 2),  # the other end is gone
        ([connection(1, 52, 62, "CLOSE_WAIT"), connection(2, 62, 52, "FIN_WAIT2")], 2),
        (both(1, None, 52, 62), 2),  # to a process of somebody else
    ],
)
def test_what_a_leak_of_connections_would_be_is_counted_with_the_handles(more: list[Any], expected: int) -> None:
    assert num_channels(1, both(1, 2, 50, 60) + both(2, 1, 51, 61) + more, {1, 2}) == expected


def test_leaks() -> None:
    record = a_run()
    found = report.leaks(record)
    assert (found["processes"], found["file_handles"]) == (1, 3)
    assert found["rss_slope_mb_per_min"] == pytest.approx(6.0)
    assert found["own_slope_of_mb_per_min"] == {"front": pytest.approx(3.0)}
    record.left_over = ["ray::ExpertWorker"]
    assert report.leaks(record)["processes"] == 2
    assert "outlived" in report.problems(record)[-1]


def test_the_least_of_two_looks() -> None:
    one = Vitals(1, {"front": 5, "router": 9}, {"front": 3, "router": 4}, {"front": 40, "router": 70}, 21)
    other = Vitals(2, {"front": 6}, {"front": 2}, {"front": 39}, 22)
    least = report.least_of(one, other)
    assert least == Vitals(2, {"front": 5, "router": 9}, {"front": 2, "router": 4}, {"front": 39, "router": 70}, 21)
    assert not report.has_grown(one, least)
    assert report.has_grown(least, one), "a handle of the front"
    assert report.has_grown(one, replace(one, num_processes=22))


def test_a_slope_is_that_of_the_line() -> None:
    assert report.slope([(0, 1), (1, 3), (2, 5)]) == pytest.approx(2)
    assert report.slope([(1, 1), (1, 3)]) == 0


def test_problems_are_told_once_with_their_number() -> None:
    record = Record(2, is_exact=True, commits=commits(1.0, 2.0), undisturbed_losses=(3.0, 3.0 + 1e-8))
    record.requests = [Request("training", 0, 0, 1, (), "Unavailable: gone")] * 3
    record.strikes = [Strike(1, "training", "stall", "expert-0", 1.0, 0.0, 2.0, "taken for dead")]
    found = report.problems(record)
    assert "fault 1 (stall expert-0): taken for dead" in found
    assert "a stream failed in the training phase: Unavailable: gone (3 times)" in found
    assert any("losses differ" in problem for problem in found)
    record.commits = [replace(commit, step=7) for commit in record.commits]
    assert any("skipped" in problem for problem in report.problems(record))
    assert report.problems(Record(2)) == []


def test_the_document_is_json_and_a_table_also_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for record in (a_run(), Record(3)):
        document = report.summary(record)
        json.dumps(plain(document), allow_nan=False)
        show(document)
    shown = capsys.readouterr().out
    assert "kill" in shown
    assert "not measured" in shown


# --- Picture -----------------------------------------------------------------------------------------------------


def test_degraded_spans() -> None:
    looks = [Look(float(n), 3, missing) for n, missing in enumerate(["", "x", "y", "", "", "x"])]
    assert degraded(looks) == [Span(1.0, 3.0), Span(5.0, 5.0)]
    assert degraded([]) == []


def test_longest_wait() -> None:
    gaps = [Gap("serving", 0.0, 1.0), Gap("serving", 1.0, 1.5)]
    assert longest_wait_s(gaps, Span(1.0, 2.0)) == 1.0
    assert longest_wait_s(gaps, Span(5.0, 6.0)) != longest_wait_s(gaps, Span(5.0, 6.0)), "NaN"


def test_the_timeline_is_drawn(tmp_path: Path) -> None:
    for record in (a_run(), Record(2, looks=[Look(1.0, 2, "")])):
        draw_timeline(tmp_path / "t.png", record)
        assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


# --- Options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "seconds"), [("30s", 30), ("2m", 120), ("1h", 3600), ("7", 7), ("0.5m", 30)])
def test_durations(text: str, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "-1s", "ten", "0"])
def test_durations_that_are_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        duration(text)


def test_kinds_of_the_command_line() -> None:
    assert kinds("stall,kill") == ("stall", "kill")
    assert kinds(",".join(KINDS)) == KINDS
    with pytest.raises(argparse.ArgumentTypeError):
        kinds("kill,flood")


def test_phases_of_the_command_line() -> None:
    assert phases("serving") == ("serving",)
    assert phases("serving,training") == ("training", "serving")
    with pytest.raises(argparse.ArgumentTypeError):
        phases("resting")


def test_a_staleness_of_the_command_line_is_the_jobs() -> None:
    assert job_config(None, 4).optimizer.staleness == 4
    assert job_config("demo", 0).optimizer.staleness == 0
    with pytest.raises(InvalidInput, match=rf"optimizer\.staleness: is outside 0 to {MAX_STALENESS} \(got -1\)"):
        job_config(None, -1)


def test_a_job_of_ones_own_does_not_depend_on_its_length() -> None:
    job = job_config("demo")
    assert (job.schedule.kind, job.schedule.warmup_steps, job.eval.every_steps) == ("constant", 0, 0)
    assert job.batch.sequences == 8
