"""Reports of the experts' load."""

from __future__ import annotations

from cluster.backend import LoadReport, LoadStep
from cluster.service.codec import checks, times
from cluster.service.codec.checks import Range
from protos.moecluster.v1 import cluster_pb2 as pb

DEFAULT_INTERVAL_S = 1.0
INTERVALS_S = Range(0.2, 60.0)


def report_to_message(report: LoadReport) -> pb.LoadReport:
    return pb.LoadReport(
        version=report.version,
        window_steps=report.window_steps,
        group_size=report.group_size,
        load=[pb.LayerLoad(tokens=load_E) for load_E in report.load_LE],
        actors=dict(report.actors),
        nodes=dict(report.nodes),
        layer_max_vio=report.max_vio_L,
        max_vio=report.max_vio,
        layer_utilisation_std=report.utilisation_std_L,
        utilisation_std=report.utilisation_std,
        microbatch_tokens_per_expert=report.microbatch_tokens_per_expert,
        step_tokens_per_expert=report.step_tokens_per_expert,
        warning=report.warning,
        history=[_step_to_message(step) for step in report.history],
    )


def report_from_message(message: pb.LoadReport) -> LoadReport:
    return LoadReport(
        version=message.version,
        window_steps=message.window_steps,
        group_size=message.group_size,
        load_LE=tuple(tuple(layer.tokens) for layer in message.load),
        actors=dict(message.actors),
        nodes=dict(message.nodes),
        max_vio_L=tuple(message.layer_max_vio),
        max_vio=message.max_vio,
        utilisation_std_L=tuple(message.layer_utilisation_std),
        utilisation_std=message.utilisation_std,
        microbatch_tokens_per_expert=message.microbatch_tokens_per_expert,
        step_tokens_per_expert=message.step_tokens_per_expert,
        warning=message.warning,
        history=tuple(_step_from_message(step) for step in message.history),
    )


def interval_to_message(interval_s: float) -> pb.WatchLoadRequest:
    checks.number("interval_s", interval_s, INTERVALS_S)
    return pb.WatchLoadRequest(interval_s=interval_s)


def interval_from_message(message: pb.WatchLoadRequest) -> float:
    if not message.HasField("interval_s"):
        return DEFAULT_INTERVAL_S
    checks.number("interval_s", message.interval_s, INTERVALS_S)
    return message.interval_s


def _step_to_message(step: LoadStep) -> pb.LoadStep:
    return pb.LoadStep(version=step.version, time=times.to_message(step.time_s), tokens=step.tokens, load=step.load_E)


def _step_from_message(message: pb.LoadStep) -> LoadStep:
    return LoadStep(message.version, times.from_message(message.time), message.tokens, tuple(message.load))
