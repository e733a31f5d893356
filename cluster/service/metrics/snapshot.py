"""The cluster's state as metric families. Pure: values in, families out. Units are in the names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from cluster.backend import ClusterStatus, Job, JobEvent, LoadReport
from cluster.control.ledger import Entry

MAX_EXPERT_SERIES = 1024
"""Models with more experts a layer than that have no series an expert; those of layers and actors are always there."""


@dataclass(frozen=True)
class Snapshot:
    status: ClusterStatus
    load: LoadReport
    entries: Sequence[Entry]
    """Of the ledger."""
    job: Job | None = None
    """The one that runs."""
    step: JobEvent | None = None
    """Its last committed step."""


def families(snapshot: Snapshot) -> Iterator[Metric]:
    yield from _cluster(snapshot.status)
    yield from _actors(snapshot.status)
    yield from _links(snapshot.status)
    yield from _gpus(snapshot.status)
    yield from _load(snapshot.load)
    yield from _ledger(snapshot.entries)
    if snapshot.step is not None:
        yield from _training(snapshot.step)


def _cluster(status: ClusterStatus) -> Iterator[Metric]:
    scarce = sum(group not in status.copies for group in status.owners)
    num_groups = status.num_experts // status.group_size
    yield _gauge("ready", "Whether requests are served.", float(status.ready))
    yield _counter("steps_committed", "Training steps in the weights (their version).", status.version)
    yield _gauge("placement_epoch", "Changes of placement so far.", status.placement_epoch)
    yield _gauge("expert_groups", "Expert groups of the model.", num_groups)
    yield _gauge("expert_groups_lost", "Expert groups that nobody holds.", num_groups - len(status.owners))
    yield _gauge("expert_groups_single", "Expert groups that one actor holds, and no other.", scarce)
    yield _gauge("pins", "Versions that are kept for requests.", len(status.pins))
    jobs = GaugeMetricFamily("moe_cluster_jobs", "Jobs by state.", labels=["state"])
    for state, number in status.jobs.items():
        jobs.add_metric([state], number)
    yield jobs


def _actors(status: ClusterStatus) -> Iterator[Metric]:
    labels = ["actor", "role", "node"]
    ready = GaugeMetricFamily("moe_cluster_actor_ready", "Whether the actor answers.", labels=labels)
    memory = GaugeMetricFamily(
        "moe_cluster_actor_memory_bytes", "Parameters, gradients and optimizer state.", labels=[*labels, "device"]
    )
    pinned = GaugeMetricFamily(
        "moe_cluster_actor_pinned_bytes", "Beside its memory, for pinned versions alone.", labels=labels
    )
    version = GaugeMetricFamily("moe_cluster_actor_version", "Committed steps in its weights.", labels=labels)
    staleness = GaugeMetricFamily(
        "moe_cluster_actor_staleness_steps", "Steps that its weights are behind the newest.", labels=labels
    )
    merged = CounterMetricFamily(
        "moe_cluster_actor_merged_updates", "Committed updates that were made as part of others.", labels=labels
    )
    groups = GaugeMetricFamily("moe_cluster_actor_groups", "Expert groups it owns or has a copy of.", labels=labels)
    tokens = CounterMetricFamily("moe_cluster_actor_tokens", "Tokens received since it started.", labels=labels)
    waiting = GaugeMetricFamily("moe_cluster_requests_waiting", "For their turn at the router.", labels=labels)
    queue = GaugeMetricFamily("moe_cluster_request_queue_seconds", "That the first of them has waited.", labels=labels)
    for actor in status.actors:
        names = [actor.id, actor.role, actor.node]
        ready.add_metric(names, float(actor.state == "ready"))
        memory.add_metric([*names, actor.device], actor.memory_bytes)
        pinned.add_metric(names, actor.pinned_bytes)
        version.add_metric(names, actor.version)
        staleness.add_metric(names, max(0, status.version - actor.version))
        if actor.role == "expert":
            groups.add_metric(names, len(actor.groups))
            tokens.add_metric(names, actor.tokens)
            merged.add_metric(names, actor.merged_updates)
        else:
            waiting.add_metric(names, actor.num_waiting)
            queue.add_metric(names, actor.queue_s)
    yield from (ready, memory, pinned, version, staleness, groups, tokens, merged, waiting, queue)


def _links(status: ClusterStatus) -> Iterator[Metric]:
    labels = ["actor", "role", "kind"]
    sent = CounterMetricFamily("moe_cluster_link_sent_bytes", "Over links that the actor opened.", labels=labels)
    received = CounterMetricFamily("moe_cluster_link_received_bytes", "Answers over the same links.", labels=labels)
    wait = CounterMetricFamily(
        "moe_cluster_link_wait_seconds", "Time that its threads waited for answers.", labels=labels
    )
    for actor in status.actors:
        for use in actor.link_use:
            names = [actor.id, actor.role, use.kind]
            sent.add_metric(names, use.sent_bytes)
            received.add_metric(names, use.received_bytes)
            wait.add_metric(names, use.wait_s)
    yield from (sent, received, wait)


def _gpus(status: ClusterStatus) -> Iterator[Metric]:
    """Without series where no actor has a GPU, or none tells how busy it is."""
    labels = ["actor", "role", "node"]
    used = GaugeMetricFamily("moe_cluster_gpu_memory_used_bytes", "Of the actor's GPU, by whomever.", labels=labels)
    total = GaugeMetricFamily("moe_cluster_gpu_memory_total_bytes", "Of the actor's GPU.", labels=labels)
    allocated = GaugeMetricFamily("moe_cluster_gpu_memory_allocated_bytes", "By tensors of the actor.", labels=labels)
    busy = GaugeMetricFamily("moe_cluster_gpu_busy_ratio", "Share of the time that it computed.", labels=labels)
    for actor in status.actors:
        if actor.gpu is not None:
            names = [actor.id, actor.role, actor.node]
            used.add_metric(names, actor.gpu.used_bytes)
            total.add_metric(names, actor.gpu.total_bytes)
            allocated.add_metric(names, actor.gpu.allocated_bytes)
            if actor.gpu.busy_ratio is not None:
                busy.add_metric(names, actor.gpu.busy_ratio)
    yield from (used, total, allocated, busy)


def _load(load: LoadReport) -> Iterator[Metric]:
    vio = GaugeMetricFamily(
        "moe_cluster_load_max_vio_ratio", "Largest load over the layer's mean, less 1.", labels=["layer"]
    )
    spread = GaugeMetricFamily(
        "moe_cluster_load_std_ratio", "Standard deviation of load over the layer's mean.", labels=["layer"]
    )
    for layer, (max_vio, std) in enumerate(zip(load.max_vio_L, load.utilisation_std_L, strict=True)):
        vio.add_metric([str(layer)], max_vio)
        spread.add_metric([str(layer)], std)
    experts = GaugeMetricFamily(
        "moe_cluster_expert_pairs", "Pairs an expert number got in the window.", labels=["expert"]
    )
    if load.load_LE and len(load.load_LE[0]) <= MAX_EXPERT_SERIES:
        for expert, pairs in enumerate(map(sum, zip(*load.load_LE, strict=True))):
            experts.add_metric([str(expert)], pairs)
    actors = GaugeMetricFamily(
        "moe_cluster_actor_pairs", "Pairs of the experts that it holds, in the window.", labels=["actor"]
    )
    for actor, pairs in load.actors.items():
        actors.add_metric([actor], pairs)
    yield from (vio, spread, experts, actors)
    yield _gauge("load_window_steps", "Steps that load is summed over.", load.window_steps)
    mean = load.microbatch_tokens_per_expert
    yield _gauge("tokens_per_expert", "Mean pairs an expert of a layer gets a micro-batch.", mean)


def _ledger(entries: Sequence[Entry]) -> Iterator[Metric]:
    costs: dict[str, tuple[str, Callable[[Entry], float]]] = {
        "disturbances": ("Deaths, changes of size, moves.", lambda entry: 1),
        "disturbance_stall_seconds": ("Time that steps waited.", lambda entry: entry.stall_s),
        "steps_replayed": ("Steps that ran again.", lambda entry: entry.steps_replayed),
        "tokens_recomputed": ("Tokens of those steps.", lambda entry: entry.tokens_recomputed),
        "updates_lost": ("Optimizer updates that are in no weights.", lambda entry: entry.updates_lost),
        "requests_failed_by_disturbance": ("Requests that failed by them.", lambda entry: entry.requests_failed),
    }
    for name, (text, cost) in costs.items():
        family = CounterMetricFamily(f"moe_cluster_{name}", text, labels=["kind"])
        for kind in sorted({entry.kind for entry in entries}):
            family.add_metric([kind], sum(cost(entry) for entry in entries if entry.kind == kind))
        yield family
    yield _gauge("disturbances_open", "Disturbances that are not over.", sum(e.recovered_s is None for e in entries))


def _training(step: JobEvent) -> Iterator[Metric]:
    yield _gauge("train_step", "Steps that the running job has committed.", step.step)
    for key, name, text in (
        ("loss", "train_loss_nats", "Loss of its last step, a token."),
        ("grad_norm", "train_grad_norm", "Global gradient norm of its last step."),
        ("tokens_per_s", "train_tokens_per_second", "Of its last step."),
        ("lr", "train_learning_rate", "Of its last step."),
        ("staleness_mean", "train_staleness_mean_steps", "Of the experts its last step was computed on."),
        ("staleness_max", "train_staleness_max_steps", "Of the experts its last step was computed on."),
    ):
        if key in step.metrics:
            yield _gauge(name, text, step.metrics[key])


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"moe_cluster_{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"moe_cluster_{name}", text, value=value)
