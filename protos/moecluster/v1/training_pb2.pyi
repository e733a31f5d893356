import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class OptimizerName(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OPTIMIZER_NAME_UNSPECIFIED: _ClassVar[OptimizerName]
    OPTIMIZER_NAME_ADAMW: _ClassVar[OptimizerName]

class ExpertOptimizer(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EXPERT_OPTIMIZER_UNSPECIFIED: _ClassVar[ExpertOptimizer]
    EXPERT_OPTIMIZER_ADAMW: _ClassVar[ExpertOptimizer]
    EXPERT_OPTIMIZER_MUON: _ClassVar[ExpertOptimizer]

class SparseUpdates(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SPARSE_UPDATES_UNSPECIFIED: _ClassVar[SparseUpdates]
    SPARSE_UPDATES_NONE: _ClassVar[SparseUpdates]
    SPARSE_UPDATES_EXACT: _ClassVar[SparseUpdates]
    SPARSE_UPDATES_SKIP: _ClassVar[SparseUpdates]

class ScheduleKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SCHEDULE_KIND_UNSPECIFIED: _ClassVar[ScheduleKind]
    SCHEDULE_KIND_COSINE: _ClassVar[ScheduleKind]
    SCHEDULE_KIND_CONSTANT: _ClassVar[ScheduleKind]

class DataFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DATA_FORMAT_UNSPECIFIED: _ClassVar[DataFormat]
    DATA_FORMAT_AUTO: _ClassVar[DataFormat]
    DATA_FORMAT_TEXT: _ClassVar[DataFormat]
    DATA_FORMAT_JSONL: _ClassVar[DataFormat]
    DATA_FORMAT_PARQUET: _ClassVar[DataFormat]

class CompressionMethod(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COMPRESSION_METHOD_UNSPECIFIED: _ClassVar[CompressionMethod]
    COMPRESSION_METHOD_NONE: _ClassVar[CompressionMethod]
    COMPRESSION_METHOD_POWERSGD: _ClassVar[CompressionMethod]
    COMPRESSION_METHOD_TOPK: _ClassVar[CompressionMethod]
    COMPRESSION_METHOD_INT8: _ClassVar[CompressionMethod]
    COMPRESSION_METHOD_FP8: _ClassVar[CompressionMethod]

class JobState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    JOB_STATE_UNSPECIFIED: _ClassVar[JobState]
    JOB_STATE_QUEUED: _ClassVar[JobState]
    JOB_STATE_RUNNING: _ClassVar[JobState]
    JOB_STATE_CANCELLING: _ClassVar[JobState]
    JOB_STATE_SUCCEEDED: _ClassVar[JobState]
    JOB_STATE_FAILED: _ClassVar[JobState]
    JOB_STATE_CANCELLED: _ClassVar[JobState]

class JobEventKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    JOB_EVENT_KIND_UNSPECIFIED: _ClassVar[JobEventKind]
    JOB_EVENT_KIND_STATE: _ClassVar[JobEventKind]
    JOB_EVENT_KIND_STEP: _ClassVar[JobEventKind]
    JOB_EVENT_KIND_EVAL: _ClassVar[JobEventKind]
    JOB_EVENT_KIND_NOTE: _ClassVar[JobEventKind]
OPTIMIZER_NAME_UNSPECIFIED: OptimizerName
OPTIMIZER_NAME_ADAMW: OptimizerName
EXPERT_OPTIMIZER_UNSPECIFIED: ExpertOptimizer
EXPERT_OPTIMIZER_ADAMW: ExpertOptimizer
EXPERT_OPTIMIZER_MUON: ExpertOptimizer
SPARSE_UPDATES_UNSPECIFIED: SparseUpdates
SPARSE_UPDATES_NONE: SparseUpdates
SPARSE_UPDATES_EXACT: SparseUpdates
SPARSE_UPDATES_SKIP: SparseUpdates
SCHEDULE_KIND_UNSPECIFIED: ScheduleKind
SCHEDULE_KIND_COSINE: ScheduleKind
SCHEDULE_KIND_CONSTANT: ScheduleKind
DATA_FORMAT_UNSPECIFIED: DataFormat
DATA_FORMAT_AUTO: DataFormat
DATA_FORMAT_TEXT: DataFormat
DATA_FORMAT_JSONL: DataFormat
DATA_FORMAT_PARQUET: DataFormat
COMPRESSION_METHOD_UNSPECIFIED: CompressionMethod
COMPRESSION_METHOD_NONE: CompressionMethod
COMPRESSION_METHOD_POWERSGD: CompressionMethod
COMPRESSION_METHOD_TOPK: CompressionMethod
COMPRESSION_METHOD_INT8: CompressionMethod
COMPRESSION_METHOD_FP8: CompressionMethod
JOB_STATE_UNSPECIFIED: JobState
JOB_STATE_QUEUED: JobState
JOB_STATE_RUNNING: JobState
JOB_STATE_CANCELLING: JobState
JOB_STATE_SUCCEEDED: JobState
JOB_STATE_FAILED: JobState
JOB_STATE_CANCELLED: JobState
JOB_EVENT_KIND_UNSPECIFIED: JobEventKind
JOB_EVENT_KIND_STATE: JobEventKind
JOB_EVENT_KIND_STEP: JobEventKind
JOB_EVENT_KIND_EVAL: JobEventKind
JOB_EVENT_KIND_NOTE: JobEventKind

class JobConfig(_message.Message):
    __slots__ = ("steps", "batch", "optimizer", "schedule", "data", "eval", "balance", "compression")
    STEPS_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    EVAL_FIELD_NUMBER: _ClassVar[int]
    BALANCE_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    steps: int
    batch: BatchConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    data: DataConfig
    eval: EvalConfig
    balance: BalanceSettings
    compression: CompressionSettings
    def __init__(self, steps: _Optional[int] = ..., batch: _Optional[_Union[BatchConfig, _Mapping]] = ..., optimizer: _Optional[_Union[OptimizerConfig, _Mapping]] = ..., schedule: _Optional[_Union[ScheduleConfig, _Mapping]] = ..., data: _Optional[_Union[DataConfig, _Mapping]] = ..., eval: _Optional[_Union[EvalConfig, _Mapping]] = ..., balance: _Optional[_Union[BalanceSettings, _Mapping]] = ..., compression: _Optional[_Union[CompressionSettings, _Mapping]] = ...) -> None: ...

class BatchConfig(_message.Message):
    __slots__ = ("sequences", "sequence_length", "gradient_accumulation")
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_ACCUMULATION_FIELD_NUMBER: _ClassVar[int]
    sequences: int
    sequence_length: int
    gradient_accumulation: int
    def __init__(self, sequences: _Optional[int] = ..., sequence_length: _Optional[int] = ..., gradient_accumulation: _Optional[int] = ...) -> None: ...

class OptimizerConfig(_message.Message):
    __slots__ = ("name", "lr", "beta1", "beta2", "eps", "weight_decay", "clip_norm", "staleness", "experts", "momentum", "sparse", "delay_correction")
    NAME_FIELD_NUMBER: _ClassVar[int]
    LR_FIELD_NUMBER: _ClassVar[int]
    BETA1_FIELD_NUMBER: _ClassVar[int]
    BETA2_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    CLIP_NORM_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    MOMENTUM_FIELD_NUMBER: _ClassVar[int]
    SPARSE_FIELD_NUMBER: _ClassVar[int]
    DELAY_CORRECTION_FIELD_NUMBER: _ClassVar[int]
    name: OptimizerName
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip_norm: float
    staleness: int
    experts: ExpertOptimizer
    momentum: float
    sparse: SparseUpdates
    delay_correction: float
    def __init__(self, name: _Optional[_Union[OptimizerName, str]] = ..., lr: _Optional[float] = ..., beta1: _Optional[float] = ..., beta2: _Optional[float] = ..., eps: _Optional[float] = ..., weight_decay: _Optional[float] = ..., clip_norm: _Optional[float] = ..., staleness: _Optional[int] = ..., experts: _Optional[_Union[ExpertOptimizer, str]] = ..., momentum: _Optional[float] = ..., sparse: _Optional[_Union[SparseUpdates, str]] = ..., delay_correction: _Optional[float] = ...) -> None: ...

class ScheduleConfig(_message.Message):
    __slots__ = ("kind", "warmup_steps", "min_lr_ratio")
    KIND_FIELD_NUMBER: _ClassVar[int]
    WARMUP_STEPS_FIELD_NUMBER: _ClassVar[int]
    MIN_LR_RATIO_FIELD_NUMBER: _ClassVar[int]
    kind: ScheduleKind
    warmup_steps: int
    min_lr_ratio: float
    def __init__(self, kind: _Optional[_Union[ScheduleKind, str]] = ..., warmup_steps: _Optional[int] = ..., min_lr_ratio: _Optional[float] = ...) -> None: ...

class DataConfig(_message.Message):
    __slots__ = ("source", "format", "text_field", "shuffle", "seed", "heldout_every")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_FIELD_NUMBER: _ClassVar[int]
    SHUFFLE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    HELDOUT_EVERY_FIELD_NUMBER: _ClassVar[int]
    source: str
    format: DataFormat
    text_field: str
    shuffle: bool
    seed: int
    heldout_every: int
    def __init__(self, source: _Optional[str] = ..., format: _Optional[_Union[DataFormat, str]] = ..., text_field: _Optional[str] = ..., shuffle: _Optional[bool] = ..., seed: _Optional[int] = ..., heldout_every: _Optional[int] = ...) -> None: ...

class EvalConfig(_message.Message):
    __slots__ = ("every_steps", "batches")
    EVERY_STEPS_FIELD_NUMBER: _ClassVar[int]
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    every_steps: int
    batches: int
    def __init__(self, every_steps: _Optional[int] = ..., batches: _Optional[int] = ...) -> None: ...

class BalanceSettings(_message.Message):
    __slots__ = ("entropy", "frequency", "sequence", "bias_speed", "bias_share")
    ENTROPY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    BIAS_SPEED_FIELD_NUMBER: _ClassVar[int]
    BIAS_SHARE_FIELD_NUMBER: _ClassVar[int]
    entropy: float
    frequency: float
    sequence: float
    bias_speed: float
    bias_share: float
    def __init__(self, entropy: _Optional[float] = ..., frequency: _Optional[float] = ..., sequence: _Optional[float] = ..., bias_speed: _Optional[float] = ..., bias_share: _Optional[float] = ...) -> None: ...

class CompressionSettings(_message.Message):
    __slots__ = ("method", "rank", "share", "quantised", "copies")
    METHOD_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    QUANTISED_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    method: CompressionMethod
    rank: int
    share: float
    quantised: bool
    copies: bool
    def __init__(self, method: _Optional[_Union[CompressionMethod, str]] = ..., rank: _Optional[int] = ..., share: _Optional[float] = ..., quantised: _Optional[bool] = ..., copies: _Optional[bool] = ...) -> None: ...

class Job(_message.Message):
    __slots__ = ("id", "request_id", "config", "state", "step", "create_time", "start_time", "end_time", "error", "last_event")
    ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    START_TIME_FIELD_NUMBER: _ClassVar[int]
    END_TIME_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    LAST_EVENT_FIELD_NUMBER: _ClassVar[int]
    id: str
    request_id: str
    config: JobConfig
    state: JobState
    step: int
    create_time: _timestamp_pb2.Timestamp
    start_time: _timestamp_pb2.Timestamp
    end_time: _timestamp_pb2.Timestamp
    error: str
    last_event: int
    def __init__(self, id: _Optional[str] = ..., request_id: _Optional[str] = ..., config: _Optional[_Union[JobConfig, _Mapping]] = ..., state: _Optional[_Union[JobState, str]] = ..., step: _Optional[int] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., start_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., end_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., error: _Optional[str] = ..., last_event: _Optional[int] = ...) -> None: ...

class JobEvent(_message.Message):
    __slots__ = ("number", "time", "kind", "state", "step", "metrics", "message")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    number: int
    time: _timestamp_pb2.Timestamp
    kind: JobEventKind
    state: JobState
    step: int
    metrics: _containers.ScalarMap[str, float]
    message: str
    def __init__(self, number: _Optional[int] = ..., time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., kind: _Optional[_Union[JobEventKind, str]] = ..., state: _Optional[_Union[JobState, str]] = ..., step: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ..., message: _Optional[str] = ...) -> None: ...

class SubmitJobRequest(_message.Message):
    __slots__ = ("request_id", "config")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    config: JobConfig
    def __init__(self, request_id: _Optional[str] = ..., config: _Optional[_Union[JobConfig, _Mapping]] = ...) -> None: ...

class SubmitJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: Job
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...

class GetJobRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class GetJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: Job
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...

class ListJobsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListJobsResponse(_message.Message):
    __slots__ = ("jobs", "next_page_token")
    JOBS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    jobs: _containers.RepeatedCompositeFieldContainer[Job]
    next_page_token: str
    def __init__(self, jobs: _Optional[_Iterable[_Union[Job, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class CancelJobRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class CancelJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: Job
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...

class WatchJobRequest(_message.Message):
    __slots__ = ("job_id", "after_event")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    AFTER_EVENT_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    after_event: int
    def __init__(self, job_id: _Optional[str] = ..., after_event: _Optional[int] = ...) -> None: ...

class WatchJobResponse(_message.Message):
    __slots__ = ("event",)
    EVENT_FIELD_NUMBER: _ClassVar[int]
    event: JobEvent
    def __init__(self, event: _Optional[_Union[JobEvent, _Mapping]] = ...) -> None: ...
