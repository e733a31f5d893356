import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ActorRole(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ACTOR_ROLE_UNSPECIFIED: _ClassVar[ActorRole]
    ACTOR_ROLE_ROUTER: _ClassVar[ActorRole]
    ACTOR_ROLE_EXPERT: _ClassVar[ActorRole]

class ActorState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ACTOR_STATE_UNSPECIFIED: _ClassVar[ActorState]
    ACTOR_STATE_STARTING: _ClassVar[ActorState]
    ACTOR_STATE_READY: _ClassVar[ActorState]
    ACTOR_STATE_LOST: _ClassVar[ActorState]

class MoveKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MOVE_KIND_UNSPECIFIED: _ClassVar[MoveKind]
    MOVE_KIND_MOVE: _ClassVar[MoveKind]
    MOVE_KIND_COPY: _ClassVar[MoveKind]

class OperationKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OPERATION_KIND_UNSPECIFIED: _ClassVar[OperationKind]
    OPERATION_KIND_SCALE_EXPERTS: _ClassVar[OperationKind]
    OPERATION_KIND_DRAIN_NODE: _ClassVar[OperationKind]
    OPERATION_KIND_GROW_MODEL: _ClassVar[OperationKind]
    OPERATION_KIND_SCALE_ROUTERS: _ClassVar[OperationKind]

class OperationState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OPERATION_STATE_UNSPECIFIED: _ClassVar[OperationState]
    OPERATION_STATE_RUNNING: _ClassVar[OperationState]
    OPERATION_STATE_CANCELLING: _ClassVar[OperationState]
    OPERATION_STATE_SUCCEEDED: _ClassVar[OperationState]
    OPERATION_STATE_FAILED: _ClassVar[OperationState]
    OPERATION_STATE_CANCELLED: _ClassVar[OperationState]

class GrowthMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GROWTH_MODE_UNSPECIFIED: _ClassVar[GrowthMode]
    GROWTH_MODE_COPY: _ClassVar[GrowthMode]
    GROWTH_MODE_FRESH: _ClassVar[GrowthMode]

class LedgerKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LEDGER_KIND_UNSPECIFIED: _ClassVar[LedgerKind]
    LEDGER_KIND_ACTOR_DEATH: _ClassVar[LedgerKind]
    LEDGER_KIND_NODE_DEATH: _ClassVar[LedgerKind]
    LEDGER_KIND_FROZEN: _ClassVar[LedgerKind]
    LEDGER_KIND_ROUTER_DEATH: _ClassVar[LedgerKind]
    LEDGER_KIND_COORDINATOR_RESTART: _ClassVar[LedgerKind]
    LEDGER_KIND_SCALE_UP: _ClassVar[LedgerKind]
    LEDGER_KIND_SCALE_DOWN: _ClassVar[LedgerKind]
    LEDGER_KIND_REBALANCE: _ClassVar[LedgerKind]
    LEDGER_KIND_DRAIN: _ClassVar[LedgerKind]
    LEDGER_KIND_STORAGE_FULL: _ClassVar[LedgerKind]
    LEDGER_KIND_GROW: _ClassVar[LedgerKind]
ACTOR_ROLE_UNSPECIFIED: ActorRole
ACTOR_ROLE_ROUTER: ActorRole
ACTOR_ROLE_EXPERT: ActorRole
ACTOR_STATE_UNSPECIFIED: ActorState
ACTOR_STATE_STARTING: ActorState
ACTOR_STATE_READY: ActorState
ACTOR_STATE_LOST: ActorState
MOVE_KIND_UNSPECIFIED: MoveKind
MOVE_KIND_MOVE: MoveKind
MOVE_KIND_COPY: MoveKind
OPERATION_KIND_UNSPECIFIED: OperationKind
OPERATION_KIND_SCALE_EXPERTS: OperationKind
OPERATION_KIND_DRAIN_NODE: OperationKind
OPERATION_KIND_GROW_MODEL: OperationKind
OPERATION_KIND_SCALE_ROUTERS: OperationKind
OPERATION_STATE_UNSPECIFIED: OperationState
OPERATION_STATE_RUNNING: OperationState
OPERATION_STATE_CANCELLING: OperationState
OPERATION_STATE_SUCCEEDED: OperationState
OPERATION_STATE_FAILED: OperationState
OPERATION_STATE_CANCELLED: OperationState
GROWTH_MODE_UNSPECIFIED: GrowthMode
GROWTH_MODE_COPY: GrowthMode
GROWTH_MODE_FRESH: GrowthMode
LEDGER_KIND_UNSPECIFIED: LedgerKind
LEDGER_KIND_ACTOR_DEATH: LedgerKind
LEDGER_KIND_NODE_DEATH: LedgerKind
LEDGER_KIND_FROZEN: LedgerKind
LEDGER_KIND_ROUTER_DEATH: LedgerKind
LEDGER_KIND_COORDINATOR_RESTART: LedgerKind
LEDGER_KIND_SCALE_UP: LedgerKind
LEDGER_KIND_SCALE_DOWN: LedgerKind
LEDGER_KIND_REBALANCE: LedgerKind
LEDGER_KIND_DRAIN: LedgerKind
LEDGER_KIND_STORAGE_FULL: LedgerKind
LEDGER_KIND_GROW: LedgerKind

class ActorStatus(_message.Message):
    __slots__ = ("id", "role", "node", "pid", "state", "device", "version", "groups", "memory_bytes", "tokens", "link", "cache", "zone", "link_use", "gpu", "num_waiting", "queue_s", "merged_updates")
    ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LINK_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    ZONE_FIELD_NUMBER: _ClassVar[int]
    LINK_USE_FIELD_NUMBER: _ClassVar[int]
    GPU_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    MERGED_UPDATES_FIELD_NUMBER: _ClassVar[int]
    id: str
    role: ActorRole
    node: str
    pid: int
    state: ActorState
    device: str
    version: int
    groups: _containers.RepeatedScalarFieldContainer[int]
    memory_bytes: int
    tokens: int
    link: str
    cache: ExpertCache
    zone: str
    link_use: _containers.RepeatedCompositeFieldContainer[LinkUse]
    gpu: GpuUse
    num_waiting: int
    queue_s: float
    merged_updates: int
    def __init__(self, id: _Optional[str] = ..., role: _Optional[_Union[ActorRole, str]] = ..., node: _Optional[str] = ..., pid: _Optional[int] = ..., state: _Optional[_Union[ActorState, str]] = ..., device: _Optional[str] = ..., version: _Optional[int] = ..., groups: _Optional[_Iterable[int]] = ..., memory_bytes: _Optional[int] = ..., tokens: _Optional[int] = ..., link: _Optional[str] = ..., cache: _Optional[_Union[ExpertCache, _Mapping]] = ..., zone: _Optional[str] = ..., link_use: _Optional[_Iterable[_Union[LinkUse, _Mapping]]] = ..., gpu: _Optional[_Union[GpuUse, _Mapping]] = ..., num_waiting: _Optional[int] = ..., queue_s: _Optional[float] = ..., merged_updates: _Optional[int] = ...) -> None: ...

class LinkUse(_message.Message):
    __slots__ = ("kind", "sent_bytes", "received_bytes", "wait_s")
    KIND_FIELD_NUMBER: _ClassVar[int]
    SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    kind: str
    sent_bytes: int
    received_bytes: int
    wait_s: float
    def __init__(self, kind: _Optional[str] = ..., sent_bytes: _Optional[int] = ..., received_bytes: _Optional[int] = ..., wait_s: _Optional[float] = ...) -> None: ...

class GpuUse(_message.Message):
    __slots__ = ("used_bytes", "total_bytes", "allocated_bytes", "busy_ratio")
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    ALLOCATED_BYTES_FIELD_NUMBER: _ClassVar[int]
    BUSY_RATIO_FIELD_NUMBER: _ClassVar[int]
    used_bytes: int
    total_bytes: int
    allocated_bytes: int
    busy_ratio: float
    def __init__(self, used_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., allocated_bytes: _Optional[int] = ..., busy_ratio: _Optional[float] = ...) -> None: ...

class ExpertCache(_message.Message):
    __slots__ = ("hits", "misses", "loaded_ahead", "loaded_bytes", "wait_s", "device_bytes")
    HITS_FIELD_NUMBER: _ClassVar[int]
    MISSES_FIELD_NUMBER: _ClassVar[int]
    LOADED_AHEAD_FIELD_NUMBER: _ClassVar[int]
    LOADED_BYTES_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BYTES_FIELD_NUMBER: _ClassVar[int]
    hits: int
    misses: int
    loaded_ahead: int
    loaded_bytes: int
    wait_s: float
    device_bytes: int
    def __init__(self, hits: _Optional[int] = ..., misses: _Optional[int] = ..., loaded_ahead: _Optional[int] = ..., loaded_bytes: _Optional[int] = ..., wait_s: _Optional[float] = ..., device_bytes: _Optional[int] = ...) -> None: ...

class LayerLoad(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class GroupCopies(_message.Message):
    __slots__ = ("actors",)
    ACTORS_FIELD_NUMBER: _ClassVar[int]
    actors: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, actors: _Optional[_Iterable[str]] = ...) -> None: ...

class ClusterStatus(_message.Message):
    __slots__ = ("model", "num_parameters", "num_experts", "num_moe_layers", "top_k", "version", "placement_epoch", "owners", "group_size", "nodes", "actors", "load", "jobs", "ready", "message", "max_positions", "vocab_size", "shared_share", "copies", "staleness_mean", "staleness_max")
    class OwnersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: str
        def __init__(self, key: _Optional[int] = ..., value: _Optional[str] = ...) -> None: ...
    class JobsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class CopiesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: GroupCopies
        def __init__(self, key: _Optional[int] = ..., value: _Optional[_Union[GroupCopies, _Mapping]] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NUM_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    NUM_MOE_LAYERS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    OWNERS_FIELD_NUMBER: _ClassVar[int]
    GROUP_SIZE_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    ACTORS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    JOBS_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    MAX_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    SHARED_SHARE_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    STALENESS_MEAN_FIELD_NUMBER: _ClassVar[int]
    STALENESS_MAX_FIELD_NUMBER: _ClassVar[int]
    model: str
    num_parameters: int
    num_experts: int
    num_moe_layers: int
    top_k: int
    version: int
    placement_epoch: int
    owners: _containers.ScalarMap[int, str]
    group_size: int
    nodes: _containers.RepeatedScalarFieldContainer[str]
    actors: _containers.RepeatedCompositeFieldContainer[ActorStatus]
    load: _containers.RepeatedCompositeFieldContainer[LayerLoad]
    jobs: _containers.ScalarMap[str, int]
    ready: bool
    message: str
    max_positions: int
    vocab_size: int
    shared_share: float
    copies: _containers.MessageMap[int, GroupCopies]
    staleness_mean: float
    staleness_max: int
    def __init__(self, model: _Optional[str] = ..., num_parameters: _Optional[int] = ..., num_experts: _Optional[int] = ..., num_moe_layers: _Optional[int] = ..., top_k: _Optional[int] = ..., version: _Optional[int] = ..., placement_epoch: _Optional[int] = ..., owners: _Optional[_Mapping[int, str]] = ..., group_size: _Optional[int] = ..., nodes: _Optional[_Iterable[str]] = ..., actors: _Optional[_Iterable[_Union[ActorStatus, _Mapping]]] = ..., load: _Optional[_Iterable[_Union[LayerLoad, _Mapping]]] = ..., jobs: _Optional[_Mapping[str, int]] = ..., ready: _Optional[bool] = ..., message: _Optional[str] = ..., max_positions: _Optional[int] = ..., vocab_size: _Optional[int] = ..., shared_share: _Optional[float] = ..., copies: _Optional[_Mapping[int, GroupCopies]] = ..., staleness_mean: _Optional[float] = ..., staleness_max: _Optional[int] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: ClusterStatus
    def __init__(self, status: _Optional[_Union[ClusterStatus, _Mapping]] = ...) -> None: ...

class LoadStep(_message.Message):
    __slots__ = ("version", "time", "tokens", "load")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    version: int
    time: _timestamp_pb2.Timestamp
    tokens: int
    load: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, version: _Optional[int] = ..., time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., tokens: _Optional[int] = ..., load: _Optional[_Iterable[int]] = ...) -> None: ...

class LoadReport(_message.Message):
    __slots__ = ("version", "window_steps", "group_size", "load", "actors", "nodes", "layer_max_vio", "max_vio", "layer_utilisation_std", "utilisation_std", "microbatch_tokens_per_expert", "step_tokens_per_expert", "warning", "history")
    class ActorsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class NodesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WINDOW_STEPS_FIELD_NUMBER: _ClassVar[int]
    GROUP_SIZE_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    ACTORS_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    LAYER_MAX_VIO_FIELD_NUMBER: _ClassVar[int]
    MAX_VIO_FIELD_NUMBER: _ClassVar[int]
    LAYER_UTILISATION_STD_FIELD_NUMBER: _ClassVar[int]
    UTILISATION_STD_FIELD_NUMBER: _ClassVar[int]
    MICROBATCH_TOKENS_PER_EXPERT_FIELD_NUMBER: _ClassVar[int]
    STEP_TOKENS_PER_EXPERT_FIELD_NUMBER: _ClassVar[int]
    WARNING_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    version: int
    window_steps: int
    group_size: int
    load: _containers.RepeatedCompositeFieldContainer[LayerLoad]
    actors: _containers.ScalarMap[str, int]
    nodes: _containers.ScalarMap[str, int]
    layer_max_vio: _containers.RepeatedScalarFieldContainer[float]
    max_vio: float
    layer_utilisation_std: _containers.RepeatedScalarFieldContainer[float]
    utilisation_std: float
    microbatch_tokens_per_expert: float
    step_tokens_per_expert: float
    warning: str
    history: _containers.RepeatedCompositeFieldContainer[LoadStep]
    def __init__(self, version: _Optional[int] = ..., window_steps: _Optional[int] = ..., group_size: _Optional[int] = ..., load: _Optional[_Iterable[_Union[LayerLoad, _Mapping]]] = ..., actors: _Optional[_Mapping[str, int]] = ..., nodes: _Optional[_Mapping[str, int]] = ..., layer_max_vio: _Optional[_Iterable[float]] = ..., max_vio: _Optional[float] = ..., layer_utilisation_std: _Optional[_Iterable[float]] = ..., utilisation_std: _Optional[float] = ..., microbatch_tokens_per_expert: _Optional[float] = ..., step_tokens_per_expert: _Optional[float] = ..., warning: _Optional[str] = ..., history: _Optional[_Iterable[_Union[LoadStep, _Mapping]]] = ...) -> None: ...

class GetLoadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetLoadResponse(_message.Message):
    __slots__ = ("report",)
    REPORT_FIELD_NUMBER: _ClassVar[int]
    report: LoadReport
    def __init__(self, report: _Optional[_Union[LoadReport, _Mapping]] = ...) -> None: ...

class WatchLoadRequest(_message.Message):
    __slots__ = ("interval_s",)
    INTERVAL_S_FIELD_NUMBER: _ClassVar[int]
    interval_s: float
    def __init__(self, interval_s: _Optional[float] = ...) -> None: ...

class WatchLoadResponse(_message.Message):
    __slots__ = ("report",)
    REPORT_FIELD_NUMBER: _ClassVar[int]
    report: LoadReport
    def __init__(self, report: _Optional[_Union[LoadReport, _Mapping]] = ...) -> None: ...

class GroupMove(_message.Message):
    __slots__ = ("group", "source", "target", "num_bytes", "kind")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    group: int
    source: str
    target: str
    num_bytes: int
    kind: MoveKind
    def __init__(self, group: _Optional[int] = ..., source: _Optional[str] = ..., target: _Optional[str] = ..., num_bytes: _Optional[int] = ..., kind: _Optional[_Union[MoveKind, str]] = ...) -> None: ...

class RebalanceRequest(_message.Message):
    __slots__ = ("dry_run",)
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    dry_run: bool
    def __init__(self, dry_run: _Optional[bool] = ...) -> None: ...

class RebalanceResponse(_message.Message):
    __slots__ = ("moves", "balance_before", "balance_after", "placement_epoch", "done", "message", "unmet", "stall_s")
    MOVES_FIELD_NUMBER: _ClassVar[int]
    BALANCE_BEFORE_FIELD_NUMBER: _ClassVar[int]
    BALANCE_AFTER_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    UNMET_FIELD_NUMBER: _ClassVar[int]
    STALL_S_FIELD_NUMBER: _ClassVar[int]
    moves: _containers.RepeatedCompositeFieldContainer[GroupMove]
    balance_before: float
    balance_after: float
    placement_epoch: int
    done: bool
    message: str
    unmet: _containers.RepeatedScalarFieldContainer[str]
    stall_s: float
    def __init__(self, moves: _Optional[_Iterable[_Union[GroupMove, _Mapping]]] = ..., balance_before: _Optional[float] = ..., balance_after: _Optional[float] = ..., placement_epoch: _Optional[int] = ..., done: _Optional[bool] = ..., message: _Optional[str] = ..., unmet: _Optional[_Iterable[str]] = ..., stall_s: _Optional[float] = ...) -> None: ...

class Operation(_message.Message):
    __slots__ = ("id", "request_id", "kind", "state", "target", "progress", "message", "create_time", "end_time", "error", "prepare_s", "stall_s", "node")
    ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    END_TIME_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    PREPARE_S_FIELD_NUMBER: _ClassVar[int]
    STALL_S_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    id: str
    request_id: str
    kind: OperationKind
    state: OperationState
    target: int
    progress: float
    message: str
    create_time: _timestamp_pb2.Timestamp
    end_time: _timestamp_pb2.Timestamp
    error: str
    prepare_s: float
    stall_s: float
    node: str
    def __init__(self, id: _Optional[str] = ..., request_id: _Optional[str] = ..., kind: _Optional[_Union[OperationKind, str]] = ..., state: _Optional[_Union[OperationState, str]] = ..., target: _Optional[int] = ..., progress: _Optional[float] = ..., message: _Optional[str] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., end_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., error: _Optional[str] = ..., prepare_s: _Optional[float] = ..., stall_s: _Optional[float] = ..., node: _Optional[str] = ...) -> None: ...

class ScaleExpertsRequest(_message.Message):
    __slots__ = ("actors", "request_id")
    ACTORS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    actors: int
    request_id: str
    def __init__(self, actors: _Optional[int] = ..., request_id: _Optional[str] = ...) -> None: ...

class GrowModelRequest(_message.Message):
    __slots__ = ("num_experts", "mode", "perturbation", "seed", "open_steps", "request_id")
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    PERTURBATION_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    OPEN_STEPS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    num_experts: int
    mode: GrowthMode
    perturbation: float
    seed: int
    open_steps: int
    request_id: str
    def __init__(self, num_experts: _Optional[int] = ..., mode: _Optional[_Union[GrowthMode, str]] = ..., perturbation: _Optional[float] = ..., seed: _Optional[int] = ..., open_steps: _Optional[int] = ..., request_id: _Optional[str] = ...) -> None: ...

class GrowModelResponse(_message.Message):
    __slots__ = ("operation",)
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    operation: Operation
    def __init__(self, operation: _Optional[_Union[Operation, _Mapping]] = ...) -> None: ...

class ScaleExpertsResponse(_message.Message):
    __slots__ = ("operation",)
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    operation: Operation
    def __init__(self, operation: _Optional[_Union[Operation, _Mapping]] = ...) -> None: ...

class ScaleRoutersRequest(_message.Message):
    __slots__ = ("routers", "request_id")
    ROUTERS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    routers: int
    request_id: str
    def __init__(self, routers: _Optional[int] = ..., request_id: _Optional[str] = ...) -> None: ...

class ScaleRoutersResponse(_message.Message):
    __slots__ = ("operation",)
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    operation: Operation
    def __init__(self, operation: _Optional[_Union[Operation, _Mapping]] = ...) -> None: ...

class DrainNodeRequest(_message.Message):
    __slots__ = ("node", "deadline_s", "request_id")
    NODE_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    node: str
    deadline_s: float
    request_id: str
    def __init__(self, node: _Optional[str] = ..., deadline_s: _Optional[float] = ..., request_id: _Optional[str] = ...) -> None: ...

class DrainNodeResponse(_message.Message):
    __slots__ = ("operation",)
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    operation: Operation
    def __init__(self, operation: _Optional[_Union[Operation, _Mapping]] = ...) -> None: ...

class GetOperationRequest(_message.Message):
    __slots__ = ("operation_id",)
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    def __init__(self, operation_id: _Optional[str] = ...) -> None: ...

class GetOperationResponse(_message.Message):
    __slots__ = ("operation",)
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    operation: Operation
    def __init__(self, operation: _Optional[_Union[Operation, _Mapping]] = ...) -> None: ...

class ListOperationsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListOperationsResponse(_message.Message):
    __slots__ = ("operations",)
    OPERATIONS_FIELD_NUMBER: _ClassVar[int]
    operations: _containers.RepeatedCompositeFieldContainer[Operation]
    def __init__(self, operations: _Optional[_Iterable[_Union[Operation, _Mapping]]] = ...) -> None: ...

class WatchOperationRequest(_message.Message):
    __slots__ = ("operation_id",)
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    def __init__(self, operation_id: _Optional[str] = ...) -> None: ...

class WatchOperationResponse(_message.Message):
    __slots__ = ("operation",)
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    operation: Operation
    def __init__(self, operation: _Optional[_Union[Operation, _Mapping]] = ...) -> None: ...

class CancelOperationRequest(_message.Message):
    __slots__ = ("operation_id",)
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    def __init__(self, operation_id: _Optional[str] = ...) -> None: ...

class CancelOperationResponse(_message.Message):
    __slots__ = ("operation",)
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    operation: Operation
    def __init__(self, operation: _Optional[_Union[Operation, _Mapping]] = ...) -> None: ...

class LedgerEntry(_message.Message):
    __slots__ = ("number", "kind", "subject", "start_time", "detect_time", "recover_time", "stall_s", "steps_replayed", "tokens_recomputed", "updates_lost", "requests_delayed", "requests_failed", "message")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    START_TIME_FIELD_NUMBER: _ClassVar[int]
    DETECT_TIME_FIELD_NUMBER: _ClassVar[int]
    RECOVER_TIME_FIELD_NUMBER: _ClassVar[int]
    STALL_S_FIELD_NUMBER: _ClassVar[int]
    STEPS_REPLAYED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_RECOMPUTED_FIELD_NUMBER: _ClassVar[int]
    UPDATES_LOST_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_DELAYED_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FAILED_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    number: int
    kind: LedgerKind
    subject: str
    start_time: _timestamp_pb2.Timestamp
    detect_time: _timestamp_pb2.Timestamp
    recover_time: _timestamp_pb2.Timestamp
    stall_s: float
    steps_replayed: int
    tokens_recomputed: int
    updates_lost: int
    requests_delayed: int
    requests_failed: int
    message: str
    def __init__(self, number: _Optional[int] = ..., kind: _Optional[_Union[LedgerKind, str]] = ..., subject: _Optional[str] = ..., start_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., detect_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., recover_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., stall_s: _Optional[float] = ..., steps_replayed: _Optional[int] = ..., tokens_recomputed: _Optional[int] = ..., updates_lost: _Optional[int] = ..., requests_delayed: _Optional[int] = ..., requests_failed: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...

class LedgerSummary(_message.Message):
    __slots__ = ("kind", "n", "num_open", "median_s", "maximum_s")
    KIND_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    NUM_OPEN_FIELD_NUMBER: _ClassVar[int]
    MEDIAN_S_FIELD_NUMBER: _ClassVar[int]
    MAXIMUM_S_FIELD_NUMBER: _ClassVar[int]
    kind: LedgerKind
    n: int
    num_open: int
    median_s: float
    maximum_s: float
    def __init__(self, kind: _Optional[_Union[LedgerKind, str]] = ..., n: _Optional[int] = ..., num_open: _Optional[int] = ..., median_s: _Optional[float] = ..., maximum_s: _Optional[float] = ...) -> None: ...

class GetLedgerRequest(_message.Message):
    __slots__ = ("after_entry",)
    AFTER_ENTRY_FIELD_NUMBER: _ClassVar[int]
    after_entry: int
    def __init__(self, after_entry: _Optional[int] = ...) -> None: ...

class GetLedgerResponse(_message.Message):
    __slots__ = ("entries", "summary")
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[LedgerEntry]
    summary: _containers.RepeatedCompositeFieldContainer[LedgerSummary]
    def __init__(self, entries: _Optional[_Iterable[_Union[LedgerEntry, _Mapping]]] = ..., summary: _Optional[_Iterable[_Union[LedgerSummary, _Mapping]]] = ...) -> None: ...

class Checkpoint(_message.Message):
    __slots__ = ("version", "create_time", "url", "size_bytes", "job_id", "job_step")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    URL_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    JOB_STEP_FIELD_NUMBER: _ClassVar[int]
    version: int
    create_time: _timestamp_pb2.Timestamp
    url: str
    size_bytes: int
    job_id: str
    job_step: int
    def __init__(self, version: _Optional[int] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., url: _Optional[str] = ..., size_bytes: _Optional[int] = ..., job_id: _Optional[str] = ..., job_step: _Optional[int] = ...) -> None: ...

class SaveCheckpointRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SaveCheckpointResponse(_message.Message):
    __slots__ = ("checkpoint",)
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    checkpoint: Checkpoint
    def __init__(self, checkpoint: _Optional[_Union[Checkpoint, _Mapping]] = ...) -> None: ...

class ListCheckpointsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListCheckpointsResponse(_message.Message):
    __slots__ = ("checkpoints",)
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    checkpoints: _containers.RepeatedCompositeFieldContainer[Checkpoint]
    def __init__(self, checkpoints: _Optional[_Iterable[_Union[Checkpoint, _Mapping]]] = ...) -> None: ...

class ExportModelRequest(_message.Message):
    __slots__ = ("path",)
    PATH_FIELD_NUMBER: _ClassVar[int]
    path: str
    def __init__(self, path: _Optional[str] = ...) -> None: ...

class ExportModelResponse(_message.Message):
    __slots__ = ("path", "files", "size_bytes", "version")
    PATH_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    path: str
    files: _containers.RepeatedScalarFieldContainer[str]
    size_bytes: int
    version: int
    def __init__(self, path: _Optional[str] = ..., files: _Optional[_Iterable[str]] = ..., size_bytes: _Optional[int] = ..., version: _Optional[int] = ...) -> None: ...

class ImportModelRequest(_message.Message):
    __slots__ = ("path",)
    PATH_FIELD_NUMBER: _ClassVar[int]
    path: str
    def __init__(self, path: _Optional[str] = ...) -> None: ...

class ImportModelResponse(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: ClusterStatus
    def __init__(self, status: _Optional[_Union[ClusterStatus, _Mapping]] = ...) -> None: ...
