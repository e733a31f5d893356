"""The range and combination checks of every config, in one place: for files, overrides and specs over gRPC alike.

Each `validate_*` returns its config unchanged or raises a `ConfigError` at the first value that cannot work.
"""

from __future__ import annotations

from pathlib import Path

from actors.compress.settings import MAX_RANK
from actors.staleness import MAX_STALENESS
from actors.values import MAX_IN_FLIGHT
from cluster.config import (
    ClusterConfig,
    DataConfig,
    ExpertsConfig,
    FrontConfig,
    JobConfig,
    ModelConfig,
    OptimizerConfig,
    RayConfig,
)
from cluster.errors import ConfigError

_PATH, _STDLIB = "path:", "builtin:python-stdlib"
MAX_STEPS = 10**9
MAX_DECODE_BATCH = 1024


def validate_cluster(config: ClusterConfig, source: str) -> ClusterConfig:
    check = _Check(source)
    _check_model(config.model, check.below("model"))
    _check_ray(config.ray, check.below("ray"))

    _check_experts(config.experts, config.ray, check.below("experts"))

    check.at_least("experts.rebalance_every_s", config.experts.rebalance_every_s, 0)
    check.above("experts.autoscale.headroom", config.experts.autoscale.headroom, 0)
    for name in ("rise_s", "idle_s", "cool_down_s", "max_queue_s"):
        check.at_least(f"experts.autoscale.{name}", getattr(config.experts.autoscale, name), 0)

    check.at_least("router.actors", config.router.actors, 1)
    check.that(
        config.router.max_actors >= config.router.actors,
        "router.max_actors",
        f"is below router.actors {config.router.actors}",
        config.router.max_actors,
        f"use {config.router.actors} or more",
    )
    check.at_least("router.threads", config.router.threads, 1)
    check.within("router.in_flight", config.router.in_flight, 1, MAX_IN_FLIGHT)
    check.above("router.request_timeout_s", config.router.request_timeout_s, 0)
    check.at_least("router.max_step_retries", config.router.max_step_retries, 0)
    check.at_least("router.max_sessions", config.router.max_sessions, 1)
    check.within("router.decode_batch", config.router.decode_batch, 0, MAX_DECODE_BATCH)
    check.that(
        config.router.captured != "on" or config.router.device == "cuda",
        "router.captured",
        f"CUDA graphs need a GPU, and router.device is {config.router.device}",
        config.router.captured,
        "leave it at auto, or set router.device to cuda",
    )
    if config.router.prompt_chunk is not None:
        check.at_least("router.prompt_chunk", config.router.prompt_chunk, 0)
    check.at_least("router.max_pins", config.router.max_pins, 0)

    check.at_least("links.max_message_bytes", config.links.max_message_bytes, 1 << 16)
    _check_payload(config, check)
    _check_front(config.front, check.below("front"))
    check.that(bool(config.storage.root), "storage.root", "is empty", None, "name a directory")
    check.at_least("checkpoint.every_steps", config.checkpoint.every_steps, 0)
    check.at_least("checkpoint.keep", config.checkpoint.keep, 2)
    return config


def _check_payload(config: ClusterConfig, check: _Check) -> None:
    for where in ("router", "experts"):
        device = getattr(config, where).device
        check.that(
            config.links.payload not in ("cuda_ipc", "nccl") or device == "cuda",
            "links.payload",
            f"is between GPUs, and {where}.device is {device}",
            config.links.payload,
            f"set {where}.device to cuda, or this to auto",
        )
    check.that(
        config.links.relay != "on" or config.links.payload not in ("cuda_ipc", "nccl"),
        "links.relay",
        f"tokens pass a relay in host memory, and links.payload is {config.links.payload}",
        config.links.relay,
        "leave it at auto, or set links.payload to auto",
    )


def validate_job(config: JobConfig, source: str, *, max_positions: int = 0) -> JobConfig:
    """`max_positions`: longest sequence the model takes, tokens; 0 where the model is not known yet."""
    check = _Check(source)
    check.within("steps", config.steps, 1, MAX_STEPS)

    check.at_least("batch.sequences", config.batch.sequences, 1)
    check.at_least("batch.gradient_accumulation", config.batch.gradient_accumulation, 1)
    length = config.batch.sequence_length
    # The model predicts token i + 1 from those up to i: a sequence of one token has nothing to predict.
    check.at_least("batch.sequence_length", length, 2)
    check.that(
        not max_positions or length <= max_positions,
        "batch.sequence_length",
        f"is beyond the model's {max_positions} positions",
        length,
        f"use at most {max_positions}",
    )

    _check_optimizer(config.optimizer, check.below("optimizer"))
    check.within("schedule.min_lr_ratio", config.schedule.min_lr_ratio, 0, 1)
    check.at_least("schedule.warmup_steps", config.schedule.warmup_steps, 0)
    check.that(
        config.schedule.warmup_steps <= config.steps,
        "schedule.warmup_steps",
        f"is more than the job's {config.steps} steps",
        config.schedule.warmup_steps,
        "warm up for fewer steps",
    )

    _check_data(config.data, check.below("data"))
    check.at_least("eval.every_steps", config.eval.every_steps, 0)
    check.at_least("eval.batches", config.eval.batches, 1)
    for name in ("entropy", "frequency", "sequence", "bias_speed"):
        check.at_least(f"balance.{name}", getattr(config.balance, name), 0)
    check.within("balance.bias_share", config.balance.bias_share, 0, 1)
    check.within("compression.rank", config.compression.rank, 1, MAX_RANK)
    check.above("compression.share", config.compression.share, 0)
    check.within("compression.share", config.compression.share, 0, 1)
    check.that(
        config.data.heldout_every > 0 or config.eval.every_steps == 0,
        "data.heldout_every",
        "holds out no documents, but eval.every_steps asks for evaluation",
        config.data.heldout_every,
        "hold some out (50 is usual) or set eval.every_steps to 0",
    )
    return config


def validate_job_on(config: JobConfig, experts: ExpertsConfig, source: str) -> JobConfig:
    """What a job asks of expert actors that are there already."""
    _Check(source).that(
        not config.optimizer.staleness or not experts.expert_cache_size,
        "optimizer.staleness",
        f"updates beside forwards need all expert groups on the device, and experts.expert_cache_size is "
        f"{experts.expert_cache_size}",
        config.optimizer.staleness,
        "set it to 0, or run a cluster with experts.expert_cache_size 0",
    )
    return config


def validate_model(config: ModelConfig, source: str, prefix: str = "") -> ModelConfig:
    _check_model(config, _Check(source, prefix))
    return config


def _check_model(config: ModelConfig, check: _Check) -> None:
    check.that(
        (config.path is None) != (not config.values),
        "",
        "needs either `path` or `values`, and not both",
        None,
        "give the path of a Hugging Face model directory, or the values of a transformers config",
    )
    check.at_least("seed", config.seed, 0)
    if config.path is not None:
        check.that(
            (Path(config.path) / "config.json").is_file(),
            "path",
            "is not a Hugging Face model directory: it has no config.json",
            config.path,
            "name a directory written by save_pretrained",
        )
    elif not isinstance(config.values.get("model_type"), str):
        found = config.values.get("model_type")
        check.that(False, "values.model_type", "is missing or not a text", found, "name one, e.g. deepseek_v3")


def _check_ray(config: RayConfig, check: _Check) -> None:
    check.at_least("nodes", config.nodes, 1)
    check.within("zones", config.zones, 0, config.nodes)
    check.above("start_timeout_s", config.start_timeout_s, 0)
    check.at_least("orphan_timeout_s", config.orphan_timeout_s, 5)
    check.at_least("revive_after_s", config.revive_after_s, 0)
    if config.mode == "embedded":
        remedy = "leave the address out, or set ray.mode to existing"
        check.that(config.address is None, "address", "an embedded cluster has none", config.address, remedy)
        remedy = "leave it out, or set ray.mode to existing"
        check.that(not config.detached, "detached", "an embedded cluster ends with its process", True, remedy)
    else:
        remedy = "give one, e.g. auto or 10.0.0.1:6379, or set ray.mode to embedded"
        check.that(bool(config.address), "address", "is needed to join an existing cluster", config.address, remedy)


def _check_experts(config: ExpertsConfig, ray: RayConfig, check: _Check) -> None:
    check.at_least("actors", config.actors, 1)
    check.at_least("group_size", config.group_size, 1)
    check.at_least("threads", config.threads, 1)
    check.at_least("redundancy", config.redundancy, 1)
    check.at_least("snapshot_every_steps", config.snapshot_every_steps, 0)
    check.at_least("max_groups", config.max_groups, 0)
    check.at_least("expert_cache_size", config.expert_cache_size, 0)
    check.at_least("max_pairs", config.max_pairs, 0)
    check.at_least("serving_weight", config.serving_weight, 1)
    check.that(
        not config.cache_dir or config.expert_cache_size > 0,
        "cache_dir",
        "is of no use without a cache",
        config.cache_dir,
        "set experts.expert_cache_size to the groups that the device has room for, or leave it out",
    )
    check.that(
        config.redundancy <= config.actors,
        "redundancy",
        f"is more than the {config.actors} expert actors",
        config.redundancy,
        f"use at most {config.actors}, or set experts.actors to {config.redundancy} or more",
    )
    check.that(
        ray.mode != "embedded" or config.redundancy <= ray.nodes,
        "redundancy",
        f"copies of a group go to different nodes, and ray.nodes is {ray.nodes}",
        config.redundancy,
        f"use at most {ray.nodes}, or set ray.nodes to {config.redundancy} or more",
    )


def _check_front(config: FrontConfig, check: _Check) -> None:
    check.that(bool(config.host), "host", "is empty", None, "name an interface, e.g. 127.0.0.1")
    check.within("port", config.port, 0, 65535)
    for name, port in (("health_port", config.health_port), ("metrics_port", config.metrics_port)):
        if port is not None:
            check.within(name, port, 0, 65535)
            check.that(port != config.port or port == 0, name, "is the front's own port", port, "use another")
    is_other = config.metrics_port != config.health_port or not config.metrics_port
    check.that(is_other, "metrics_port", "is that of front.health_port", config.metrics_port, "use another")
    check.at_least("max_receive_bytes", config.max_receive_bytes, 1 << 10)
    check.at_least("max_concurrent_rpcs", config.max_concurrent_rpcs, 1)
    check.at_least("shutdown_grace_s", config.shutdown_grace_s, 0)
    tls = config.tls
    for needed, given in (("certificate", "key"), ("key", "certificate"), ("certificate", "client_ca")):
        is_whole = bool(getattr(tls, needed)) or not getattr(tls, given)
        remedy = f"name the PEM file, or leave tls.{given} out"
        check.that(is_whole, f"tls.{needed}", f"is missing beside tls.{given}", None, remedy)


def _check_optimizer(config: OptimizerConfig, check: _Check) -> None:
    check.above("lr", config.lr, 0)
    check.below_one("beta1", config.beta1)
    check.below_one("beta2", config.beta2)
    check.above("eps", config.eps, 0)
    check.at_least("weight_decay", config.weight_decay, 0)
    check.at_least("clip_norm", config.clip_norm, 0)
    check.below_one("momentum", config.momentum)
    check.at_least("delay_correction", config.delay_correction, 0)
    check.within("staleness", config.staleness, 0, MAX_STALENESS)
    check.that(
        config.sparse != "exact" or not config.staleness,
        "sparse",
        "beside forwards nobody makes steps that were put off",
        config.sparse,
        "use skip or none, or optimizer.staleness 0",
    )
    check.that(
        config.experts != "muon" or config.sparse != "exact",
        "sparse",
        "under Muon a step without a gradient is as long and as dear as any other",
        config.sparse,
        "use skip, which leaves experts without tokens alone, or none",
    )


def _check_data(config: DataConfig, check: _Check) -> None:
    is_path = config.source.startswith(_PATH) and len(config.source) > len(_PATH)
    remedy = f"use {_STDLIB}, or {_PATH} followed by a file, a directory or a glob"
    check.that(is_path or config.source == _STDLIB, "source", "is no known source", config.source, remedy)
    check.that(
        config.source != _STDLIB or config.format in ("auto", "text"),
        "format",
        f"{_STDLIB} is text",
        config.format,
        "leave the format out",
    )
    check.that(bool(config.text_field), "text_field", "is empty", None, "name the field that holds the text")
    check.at_least("seed", config.seed, 0)
    check.at_least("heldout_every", config.heldout_every, 0)
    remedy = "hold out every 2nd or fewer, or none with 0"
    check.that(config.heldout_every != 1, "heldout_every", "leaves nothing to train on", config.heldout_every, remedy)


class _Check:
    """Raises `ConfigError` for one source; names are dotted paths below `prefix`."""

    def __init__(self, source: str, prefix: str = "") -> None:
        self._source = source
        self._prefix = prefix

    def below(self, name: str) -> _Check:
        return _Check(self._source, self._path(name))

    def that(self, condition: bool, name: str, message: str, value: object, remedy: str) -> None:
        if not condition:
            path = self._path(name)
            field = f"{self._source}: {path}" if path else self._source
            raise ConfigError(message, field=field, value=value, remedy=remedy)

    def at_least(self, name: str, value: float, minimum: float) -> None:
        self.that(value >= minimum, name, f"is below {minimum}", value, f"use {minimum} or more")

    def above(self, name: str, value: float, bound: float) -> None:
        self.that(value > bound, name, f"is not above {bound}", value, f"use a number above {bound}")

    def within(self, name: str, value: float, minimum: float, maximum: float) -> None:
        remedy = f"use a number from {minimum} to {maximum}"
        self.that(minimum <= value <= maximum, name, f"is outside {minimum} to {maximum}", value, remedy)

    def below_one(self, name: str, value: float) -> None:
        self.that(0 <= value < 1, name, "is outside [0, 1)", value, "use at least 0 and less than 1")

    def _path(self, name: str) -> str:
        return ".".join(part for part in (self._prefix, name) if part)
