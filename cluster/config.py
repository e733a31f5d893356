"""The one config schema. YAML files under configs/ hold values only; `load` turns them into these classes.

An unknown key, a wrong type or an impossible combination raises `ConfigError` with file, path, value and remedy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from actors.compress.settings import CompressionSettings
from actors.moe.settings import BalanceSettings, GateSettings


@dataclass(frozen=True)
class RayConfig:
    mode: Literal["embedded", "existing"] = "embedded"
    """embedded: start our own nodes on this machine; existing: join the cluster at `address`."""
    address: str | None = None
    nodes: int = 2
    """Simulated nodes that carry expert actors when embedded (the head takes none)."""
    zones: int = 0
    """Zones in which the simulated nodes are, in turn; 0: they have none. Nodes of an existing cluster tell theirs by
    Ray's label `ray.io/availability-zone`."""
    start_timeout_s: float = 60.0
    detached: bool = False
    """existing: the cluster goes on when the process that has started it ends or is killed. `moe-cluster up` with the
    same checkpoint folder attaches to it, `moe-cluster down` ends it."""
    orphan_timeout_s: float = 60.0
    """existing: router and expert actors end themselves when no coordinator has asked after them for so long. Ray must
    be able to start it again within that time, also when its head was away."""
    revive_after_s: float = 5.0
    """An embedded node that died is started again after so long, as a cluster's own manager would; 0: never."""


@dataclass(frozen=True)
class AutoscaleConfig:
    """When expert actors are added or taken away by themselves; see `cluster.control.scaling`."""

    enabled: bool = False
    headroom: float = 0.2
    """Demand counts for so much more."""
    rise_s: float = 10.0
    """Demand must be too high for so long before actors are added."""
    idle_s: float = 300.0
    """Demand must fit fewer actors for so long before any is taken away."""
    cool_down_s: float = 60.0
    """After a change the demand alone changes nothing for so long."""
    max_queue_s: float = 2.0
    """Requests that wait longer add actors."""


@dataclass(frozen=True)
class ExpertsConfig:
    actors: int = 2
    """At the start."""
    min_actors: int = 1
    max_actors: int = 8
    """Bounds for scaling."""
    autoscale: AutoscaleConfig = AutoscaleConfig()
    rebalance_every_s: float = 0.0
    """How often the load is looked at, to move and copy groups when that makes it more even; 0: only on request."""
    group_size: int = 8
    """Experts an expert group; the group is what an actor owns and what moves. 8 to 16 for real models."""
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = 1
    """Intra-op threads of one expert actor (CPU only)."""
    redundancy: int = 1
    """Actors that hold each expert group, on different nodes: 2 survives the death of any one node. Each step sends the
    group's gradients to its copies."""
    snapshot_every_steps: int = 0
    """Steps of a job after which every actor keeps its state in host memory, and a peer on another node a copy of it:
    what is lost comes back from there rather than from the last checkpoint. Takes three times the weights' memory, for
    each actor's own state and for that of its peer; twice that while one is being made. 0: never."""
    max_groups: int = 0
    """Most groups one actor may hold, copies included; 0: as many as the placement needs, ceil(groups * redundancy /
    actors) + 1 where the nodes are alike."""
    expert_cache_size: int = 0
    """Groups of each layer whose weights the device of an actor has room for; the others are behind it until they are
    used, and so are gradients and moments. 2 or more let one be loaded while another is computed; 0: all on the
    device."""
    cache_dir: str = ""
    """Where they are then: a directory on a local disk of each node, for files that go with the actor; empty: host
    memory."""
    max_pairs: int = 0
    """Pairs of a token and an expert that an actor computes at a time, however uneven the load. What a layer of a
    micro-batch has more is computed again in backward. 0: 32,768, and on a GPU without an expert cache as many more as
    have their activations, over all layers, in a quarter of its memory."""
    serving_weight: int = 4
    """Questions of requests that an actor answers before the next one of training, where both wait. More: requests wait
    less, and training more."""


@dataclass(frozen=True)
class RouterConfig:
    actors: int = 1
    """At the start. Each has the whole trunk, computes a part of every batch and serves; no step is lost as long as one
    of them lives."""
    max_actors: int = 4
    """Bound for scaling, and what the embedded head has room for."""
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    threads: int = 2
    in_flight: int = 1
    """Micro-batches of a step (batch.gradient_accumulation) that are computed at once: while the tokens of one are with
    the experts the router computes another. The losses are the same. Each takes memory for the activations of a whole
    forward. It pays where tokens travel far, or experts have devices of their own."""
    request_timeout_s: float = 30.0
    """Deadline of one message to an expert actor and its answer."""
    max_step_retries: int = 3
    """How often one batch is run again after an aborted step before the job fails."""
    max_sessions: int = 16
    """Generate streams that decode at the same time; more wait their turn."""
    decode_batch: int = 0
    """Generate streams of one version that share each forward; 1: they decode in turns, and a stream's tokens are the
    same to the last bit whatever else runs. 0: 32 on a GPU, 1 on a CPU. No more than max_sessions."""
    captured: Literal["auto", "on", "off"] = "auto"
    """On a GPU, whether the step of streams that share a forward is captured in CUDA graphs. auto: where the model
    allows it; on: or it is an error."""
    prompt_chunk: int | None = None
    """Tokens of a prompt that are computed before the streams that decode get their next turn: fewer, and they wait
    less; more, and the prompt is sooner through. All chunks of a prompt see one version, and updates wait for its end.
    0: all tokens at once, as with models that keep other things than keys and values. null: 512 on a CPU, 2,048 on a
    GPU."""
    max_pins: int = 2
    """Versions that may be kept beside the newest: each takes up to another copy of all weights. 0: none."""


@dataclass(frozen=True)
class LinksConfig:
    kind: Literal["auto", "local", "socket"] = "auto"
    secure: Literal["auto", "on", "off"] = "auto"
    """Encrypted, and only for actors of this cluster. auto: tcp://, which leads to other hosts; on: ipc:// as well,
    which is guarded by its directory's access rights otherwise; off: neither."""
    max_message_bytes: int = 1 << 30
    payload: Literal["auto", "socket", "shm", "cuda_ipc", "nccl"] = "auto"
    """Which way large tensors go. auto: where both ends are on one host `cuda_ipc`, memory of their GPUs that each
    shows the other, or `shm`, host memory that both share, else the socket. Any other: this way or not at all.
    `cuda_ipc` and `nccl` (between two GPUs of one host) are for links between routers and experts; all others are as
    with auto then."""
    dispatch: Literal["trunk", "fp8"] = "trunk"
    """How tokens travel to the experts: in the trunk's dtype, or as FP8 with a scale a token, about 2.6 % off and half
    of bfloat16's bytes. Sums and gradients travel in the trunk's dtype either way."""
    relay: Literal["auto", "on", "off"] = "auto"
    """Where several expert actors of a node need a token, it crosses to the node once, and one of them passes it on
    inside; one sum comes back. auto: to other hosts, where that saves 256 KiB a layer and more; on: to every node, also
    on the router's own host and where it saves nothing; off: each actor is sent its own tokens."""


@dataclass(frozen=True)
class AuthConfig:
    tokens_file: str = ""
    """Who may call what: a line for each token, made by `moe-cluster token`, read again when it changes; relative to
    the working directory. Empty: everybody may call everything."""


@dataclass(frozen=True)
class TlsConfig:
    """PEM files, read again when they change; relative to the working directory. Empty: no TLS."""

    certificate: str = ""
    key: str = ""
    client_ca: str = ""
    """With it only clients that show a certificate which it has signed are let in."""


@dataclass(frozen=True)
class FrontConfig:
    host: str = "127.0.0.1"
    port: int = 50151
    """0 takes a free port; `moe-cluster up` prints it."""
    max_receive_bytes: int = 16 << 20
    max_concurrent_rpcs: int = 256
    shutdown_grace_s: float = 5.0
    auth: AuthConfig = AuthConfig()
    tls: TlsConfig = TlsConfig()
    reflection: Literal["auto", "on", "off"] = "auto"
    """auto: where no token is asked for."""
    health_port: int | None = None
    """Another port, with grpc.health.v1 alone and in clear text: probes of Kubernetes speak no TLS. null: none."""
    metrics_port: int | None = None
    """Where Prometheus reads http://HOST:PORT/metrics, in clear text and without a token. null: none."""


OWN_FRONT = FrontConfig(port=0)
"""Of clusters that a command starts for itself: on loopback, for whoever is there."""


@dataclass(frozen=True)
class StorageConfig:
    root: str = "moe-cluster-data"
    """Exports are written below this directory, and imports over gRPC are read from below it or `import_roots`."""
    import_roots: tuple[str, ...] = ()


@dataclass(frozen=True)
class CheckpointConfig:
    """The training state: weights, optimizer, gates, and where the job is in its data."""

    url: str = ""
    """A directory or any URL that fsspec knows, seen by every node; empty: `checkpoints` below storage.root. Of one
    cluster alone."""
    every_steps: int = 100
    """One is also written at the begin and at the end of a job. 0: only on request."""
    keep: int = 2
    resume: bool = True
    """At the start go on from the newest one that is there, and with the job that it was written in."""


NO_CHECKPOINTS = CheckpointConfig(every_steps=0, resume=False)
"""For clusters that are there to measure or to show something."""


@dataclass(frozen=True)
class ModelConfig:
    """Either `path` (a Hugging Face model directory) or `values` of a transformers config to start from scratch."""

    path: str | None = None
    values: dict[str, Any] = field(default_factory=dict)
    """Passed to `AutoConfig.for_model`; `model_type` is required."""
    gate: GateSettings = field(default_factory=GateSettings)
    seed: int = 0
    tokenizer: Literal["auto", "bytes"] = "auto"
    """auto: the directory's own tokenizer, bytes for a model from scratch."""


@dataclass(frozen=True)
class ClusterConfig:
    model: ModelConfig
    ray: RayConfig = RayConfig()
    experts: ExpertsConfig = ExpertsConfig()
    router: RouterConfig = RouterConfig()
    links: LinksConfig = LinksConfig()
    front: FrontConfig = FrontConfig()
    storage: StorageConfig = StorageConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()


@dataclass(frozen=True)
class BatchConfig:
    sequences: int = 8
    """Sequences a micro-batch."""
    sequence_length: int = 128
    gradient_accumulation: int = 1
    """Micro-batches a step."""


@dataclass(frozen=True)
class OptimizerConfig:
    name: Literal["adamw"] = "adamw"
    lr: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    """Global gradient norm limit over trunk and experts; 0 switches clipping off."""
    staleness: int = 0
    """Steps that the experts' weights may be behind when a step is computed: their updates are made beside it, and
    nobody waits for the slowest actor within this bound. 0: every step sees every update."""
    experts: Literal["adamw", "muon"] = "adamw"
    """What steps the experts' matrices; all else is AdamW's."""
    momentum: float = 0.95
    """Muon's."""
    sparse: Literal["none", "exact", "skip"] = "none"
    """Experts without tokens in a step: stepped like the others; so too, but when they are wanted; or left alone."""
    delay_correction: float = 0.0
    """Strength of DC-ASGD's correction of gradients that were computed with older experts; 0 switches it off."""


@dataclass(frozen=True)
class ScheduleConfig:
    kind: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = 0
    min_lr_ratio: float = 0.1


@dataclass(frozen=True)
class DataConfig:
    source: str = "builtin:python-stdlib"
    """`builtin:python-stdlib`, or `path:` followed by a file, a directory or a glob."""
    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    text_field: str = "text"
    shuffle: bool = True
    seed: int = 0
    heldout_every: int = 50
    """Every n-th document is held out for evaluation; 0 holds none out."""


@dataclass(frozen=True)
class EvalConfig:
    every_steps: int = 50
    """0: no evaluation."""
    batches: int = 4


@dataclass(frozen=True)
class JobConfig:
    steps: int = 100
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    data: DataConfig = DataConfig()
    eval: EvalConfig = EvalConfig()
    balance: BalanceSettings = field(default_factory=BalanceSettings)
    compression: CompressionSettings = field(default_factory=CompressionSettings)
    """Of the trunk's gradients where there are several routers, and on request of experts' between copies."""
