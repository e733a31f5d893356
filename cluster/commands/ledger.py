"""`ledger`: what every disturbance of the cluster cost."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from cluster.commands.options import Subparsers, add_remote
from cluster.commands.output import local_time, print_json, print_line, print_table
from cluster.control.ledger import Entry, Kind, Summary
from cluster.service.client import Client

_COLUMNS = (
    "kind",
    "subject",
    "when",
    "detection ms",
    "interruption ms",
    "stall ms",
    "steps replayed",
    "tokens recomputed",
    "updates lost",
    "requests late / failed",
)


def add_parsers(subparsers: Subparsers) -> None:
    add_remote(subparsers, "ledger", run_ledger, help="show what deaths, changes of size and moves cost")


def run_ledger(args: argparse.Namespace, client: Client) -> int:
    report = client.ledger()
    if args.json:
        print_json(report)
    elif report.entries:
        print_table(_COLUMNS, map(_row, report.entries))
        _print_summary(report.summary)
    else:
        print_line("nothing has disturbed the cluster yet")
    return 0


def _row(entry: Entry) -> tuple[str, ...]:
    return (
        entry.kind,
        entry.subject,
        local_time(entry.started_s),
        _milliseconds(entry.detection_s),
        _milliseconds(entry.interruption_s, missing="goes on"),
        _milliseconds(entry.stall_s),
        f"{entry.steps_replayed:,}",
        f"{entry.tokens_recomputed:,}",
        f"{entry.updates_lost:,}",
        f"{entry.requests_delayed:,} / {entry.requests_failed:,}",
    )


def _print_summary(summary: Mapping[Kind, Summary]) -> None:
    rows = [
        (kind, each.n, each.num_open, _milliseconds(each.median_s), _milliseconds(each.maximum_s))
        for kind, each in summary.items()
    ]
    columns = "kind", "entries", "going on", "median interruption ms", "longest interruption ms"
    print_table(columns, rows, title="by kind")


def _milliseconds(time_s: float | None, missing: str = "") -> str:
    return missing if time_s is None else f"{time_s * 1e3:,.1f}"
