"""The messages follow the schema of the code, and the style that every .proto file here keeps."""

from __future__ import annotations

import dataclasses
import typing

import pytest

from cluster import backend
from cluster.config import JobConfig
from cluster.control import ledger
from cluster.service.codec import enums
from protos.moecluster.v1 import cluster_pb2, inference_pb2, training_pb2

FILES = [module.DESCRIPTOR for module in (cluster_pb2, inference_pb2, training_pb2)]
ENUMS = [enum for file in FILES for enum in file.enum_types_by_name.values()]


def config_classes(cls: type = JobConfig) -> typing.Iterator[type]:
    yield cls
    for hint in typing.get_type_hints(cls).values():
        if dataclasses.is_dataclass(hint):
            yield from config_classes(hint)


@pytest.mark.parametrize("cls", config_classes(), ids=lambda cls: cls.__name__)
def test_the_message_of_a_config_mirrors_its_class(cls):
    message = getattr(training_pb2, cls.__name__).DESCRIPTOR
    hints = typing.get_type_hints(cls)
    assert [field.name for field in message.fields] == list(hints)
    assert all(field.has_presence for field in message.fields)
    for field in message.fields:
        if field.enum_type is not None:
            names = {enums.to_name(field.enum_type, value.number) for value in field.enum_type.values}
            assert names - {""} == set(typing.get_args(hints[field.name]))


@pytest.mark.parametrize(
    ("cls", "message", "renamed"),
    [
        (backend.Job, training_pb2.Job, {"created_s": "create_time", "started_s": "start_time", "ended_s": "end_time"}),
        (backend.JobEvent, training_pb2.JobEvent, {"time_s": "time"}),
        (backend.SamplingParams, inference_pb2.SamplingParams, {}),
        (backend.GenerateChunk, inference_pb2.GenerateResponse, {}),
        (backend.ScoreResult, inference_pb2.ScoreResponse, {}),
        (backend.EmbedResult, inference_pb2.EmbedResponse, {}),
        (backend.ActorStatus, cluster_pb2.ActorStatus, {}),
        (backend.ClusterStatus, cluster_pb2.ClusterStatus, {"load_LE": "load"}),
        (backend.LoadStep, cluster_pb2.LoadStep, {"time_s": "time", "load_E": "load"}),
        (
            backend.LoadReport,
            cluster_pb2.LoadReport,
            {"load_LE": "load", "max_vio_L": "layer_max_vio", "utilisation_std_L": "layer_utilisation_std"},
        ),
        (backend.GroupMove, cluster_pb2.GroupMove, {}),
        (backend.Rebalance, cluster_pb2.RebalanceResponse, {}),
        (backend.Operation, cluster_pb2.Operation, {"created_s": "create_time", "ended_s": "end_time"}),
        (backend.LedgerReport, cluster_pb2.GetLedgerResponse, {}),
        (
            ledger.Entry,
            cluster_pb2.LedgerEntry,
            {"started_s": "start_time", "detected_s": "detect_time", "recovered_s": "recover_time"},
        ),
        (backend.ModelDirectory, cluster_pb2.ExportModelResponse, {}),
    ],
)
def test_no_value_of_the_backend_is_left_out(cls, message, renamed):
    names = {renamed.get(field.name, field.name) for field in dataclasses.fields(cls)}
    assert names == {field.name for field in message.DESCRIPTOR.fields}


def test_the_summary_of_a_kind_is_a_message_with_the_kind():
    names = {field.name for field in dataclasses.fields(ledger.Summary)}
    assert {"kind", *names} == {field.name for field in cluster_pb2.LedgerSummary.DESCRIPTOR.fields}


@pytest.mark.parametrize(
    ("enum", "known"),
    [
        (training_pb2.JobState.DESCRIPTOR, [state.value for state in backend.JobState]),
        (cluster_pb2.OperationState.DESCRIPTOR, [state.value for state in backend.OperationState]),
        (cluster_pb2.LedgerKind.DESCRIPTOR, ledger.KINDS),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_every_state_and_kind_has_a_number(enum, known):
    assert {enums.to_name(enum, value.number) for value in enum.values} == {"", *known}


@pytest.mark.parametrize("enum", ENUMS, ids=lambda enum: enum.name)
def test_enums_start_unspecified_and_names_cross_both_ways(enum):
    assert enum.values[0].number == 0
    assert enum.values[0].name.endswith("_UNSPECIFIED")
    assert enums.to_name(enum, 0) == ""
    for value in enum.values[1:]:
        assert enums.to_number(enum, enums.to_name(enum, value.number)) == value.number
    assert enums.to_name(enum, 12345) == ""
    assert enums.to_number(enum, "newer") == 0


def test_every_call_has_a_request_and_a_response_of_its_own():
    methods = [method for file in FILES for service in file.services_by_name.values() for method in service.methods]
    for method in methods:
        assert method.input_type.name == f"{method.name}Request"
        assert method.output_type.name == f"{method.name}Response"
