"""JobConfig <-> message. The message mirrors the schema name by name, so one pair of functions serves every part."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, get_type_hints

from google.protobuf.message import Message

from actors.errors import InvalidInput
from cluster.config import JobConfig
from cluster.configcheck import validate_job
from cluster.service.codec import checks, enums
from cluster.service.codec.checks import Range
from protos.moecluster.v1 import training_pb2 as pb

Config = TypeVar("Config")

FIELD = "config"
MAX_STEP_TOKENS = 1 << 31
MAXIMA: Mapping[str, int] = {
    "steps": 10**9,
    "batch.sequences": 1 << 20,
    "batch.sequence_length": 1 << 20,
    "batch.gradient_accumulation": 1 << 20,
    "optimizer.lr": 100,
    "optimizer.beta1": 1,
    "optimizer.beta2": 1,
    "optimizer.eps": 1,
    "optimizer.weight_decay": 100,
    "optimizer.clip_norm": 10**9,
    "optimizer.momentum": 1,
    "optimizer.delay_correction": 10**9,
    "optimizer.staleness": 10**9,
    "schedule.warmup_steps": 10**9,
    "schedule.min_lr_ratio": 1,
    "data.seed": checks.MAX_INT64,
    "data.heldout_every": 10**9,
    "eval.every_steps": 10**9,
    "eval.batches": 1 << 20,
    "balance.entropy": 1000,
    "balance.frequency": 1000,
    "balance.sequence": 1000,
    "balance.bias_speed": 1,
    "balance.bias_share": 1,
    "compression.rank": 1 << 20,
    "compression.share": 1,
}
"""Every number of a job, and a size beyond which it can only be a mistake or an attack."""
TEXTS: Mapping[str, int] = {"data.source": checks.MAX_PATH_CHARS, "data.text_field": 256}
"""Every text of a job, and its most characters."""


def job_config_from_message(message: pb.JobConfig) -> JobConfig:
    """Fields that are not set take the schema's defaults."""
    return _from_message(JobConfig, message, FIELD)


def job_config_from_caller(message: pb.JobConfig) -> JobConfig:
    config = job_config_from_message(message)
    check_job_config(config)
    return config


def job_config_to_message(config: JobConfig) -> pb.JobConfig:
    message = pb.JobConfig()
    _to_message(config, message)
    return message


def check_job_config(config: JobConfig) -> None:
    """Sizes first, and numbers that are none, which the schema's own checks need not know; then those checks."""
    for path, maximum in MAXIMA.items():
        checks.number(f"{FIELD}.{path}", _at(config, path), Range(0, maximum))
    for path, max_chars in TEXTS.items():
        checks.text(f"{FIELD}.{path}", _at(config, path), max_chars)
    checks.path(f"{FIELD}.data.source", config.data.source)
    batch = config.batch
    num_tokens = batch.sequences * batch.sequence_length * batch.gradient_accumulation
    if num_tokens > MAX_STEP_TOKENS:
        remedy = f"at most {MAX_STEP_TOKENS:,}"
        raise InvalidInput("a step has too many tokens", field=f"{FIELD}.batch", value=num_tokens, remedy=remedy)
    validate_job(config, FIELD)


def _from_message(cls: type[Config], message: Message, field: str) -> Config:
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for descriptor, value in message.ListFields():
        path = f"{field}.{descriptor.name}"
        if descriptor.message_type is not None:
            values[descriptor.name] = _from_message(hints[descriptor.name], value, path)
        elif descriptor.enum_type is not None:
            if name := enums.name_from_caller(path, descriptor.enum_type, value):
                values[descriptor.name] = name
        else:
            values[descriptor.name] = value
    return cls(**values)


def _to_message(config: Any, message: Message) -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        descriptor = message.DESCRIPTOR.fields_by_name[field.name]
        if descriptor.message_type is not None:
            part: Message = getattr(message, field.name)
            part.SetInParent()
            _to_message(value, part)
        elif descriptor.enum_type is not None:
            setattr(message, field.name, enums.to_number(descriptor.enum_type, value))
        else:
            setattr(message, field.name, value)


def _at(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config
