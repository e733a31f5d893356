"""The ledger of disturbances."""

from __future__ import annotations

from typing import cast

from cluster.backend import LedgerReport
from cluster.control.ledger import Entry, Kind, Summary
from cluster.service.codec import checks, enums, times
from cluster.service.codec.checks import MAX_INT64, Range
from protos.moecluster.v1 import cluster_pb2 as pb

_KINDS = pb.LedgerKind.DESCRIPTOR


def check_after_entry(after_entry: int) -> None:
    checks.number("after_entry", after_entry, Range(0, MAX_INT64))


def report_to_message(report: LedgerReport) -> pb.GetLedgerResponse:
    return pb.GetLedgerResponse(
        entries=map(_entry_to_message, report.entries),
        summary=[_summary_to_message(kind, summary) for kind, summary in report.summary.items()],
    )


def report_from_message(message: pb.GetLedgerResponse) -> LedgerReport:
    return LedgerReport(
        entries=tuple(map(_entry_from_message, message.entries)),
        summary={_kind(summary.kind): _summary_from_message(summary) for summary in message.summary},
    )


def _entry_to_message(entry: Entry) -> pb.LedgerEntry:
    message = pb.LedgerEntry(
        number=entry.number,
        kind=enums.to_number(_KINDS, entry.kind),
        subject=entry.subject,
        start_time=times.to_message(entry.started_s),
        stall_s=entry.stall_s,
        steps_replayed=entry.steps_replayed,
        tokens_recomputed=entry.tokens_recomputed,
        updates_lost=entry.updates_lost,
        requests_delayed=entry.requests_delayed,
        requests_failed=entry.requests_failed,
        message=entry.message,
    )
    if entry.detected_s is not None:
        message.detect_time.CopyFrom(times.to_message(entry.detected_s))
    if entry.recovered_s is not None:
        message.recover_time.CopyFrom(times.to_message(entry.recovered_s))
    return message


def _entry_from_message(message: pb.LedgerEntry) -> Entry:
    return Entry(
        number=message.number,
        kind=_kind(message.kind),
        subject=message.subject,
        started_s=times.from_message(message.start_time),
        detected_s=times.from_message(message.detect_time) if message.HasField("detect_time") else None,
        recovered_s=times.from_message(message.recover_time) if message.HasField("recover_time") else None,
        stall_s=message.stall_s,
        steps_replayed=message.steps_replayed,
        tokens_recomputed=message.tokens_recomputed,
        updates_lost=message.updates_lost,
        requests_delayed=message.requests_delayed,
        requests_failed=message.requests_failed,
        message=message.message,
    )


def _summary_to_message(kind: Kind, summary: Summary) -> pb.LedgerSummary:
    return pb.LedgerSummary(
        kind=enums.to_number(_KINDS, kind),
        n=summary.n,
        num_open=summary.num_open,
        median_s=summary.median_s,
        maximum_s=summary.maximum_s,
    )


def _summary_from_message(message: pb.LedgerSummary) -> Summary:
    return Summary(
        n=message.n,
        num_open=message.num_open,
        median_s=message.median_s if message.HasField("median_s") else None,
        maximum_s=message.maximum_s if message.HasField("maximum_s") else None,
    )


def _kind(number: int) -> Kind:
    return cast(Kind, enums.to_name(_KINDS, number))  # the empty name, too, for a kind of a newer protocol
