"""The border between the exception tree and gRPC."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from google.rpc import error_details_pb2

from actors import errors as actor_errors
from actors.errors import CheckpointError, InvalidInput, LinkTimeout, MoeClusterError, NonFinite, PeerLost, RemoteError
from cluster import errors as cluster_errors
from cluster.errors import ConfigError, FailedPrecondition, ResourceExhausted, Unavailable
from cluster.service import errors

MODULES = (actor_errors.__name__, cluster_errors.__name__)


def tree(cls: type[MoeClusterError] = MoeClusterError) -> Iterator[type[MoeClusterError]]:
    yield cls
    for below in cls.__subclasses__():
        yield from tree(below)


class Failed(grpc.RpcError):
    """What gRPC raises in a client when the front answers with `status`."""

    def __init__(self, code: grpc.StatusCode, text: str, details: bytes | None = None) -> None:
        self._code, self._text, self._details = code, text, details

    @classmethod
    def with_status(cls, status) -> Failed:
        code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
        return cls(code, status.message, status.SerializeToString())

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._text

    def trailing_metadata(self):
        return (("grpc-status-details-bin", self._details),) if self._details is not None else ()


def returned(error: Exception) -> MoeClusterError:
    return errors.from_rpc_error(Failed.with_status(errors.to_status(error, "r")), "host:1")


def kinds(status) -> set[str]:
    return {packed.TypeName() for packed in status.details}


def test_every_class_of_the_tree_has_an_entry_and_no_other():
    assert {cls for cls in tree() if cls.__module__ in MODULES} == set(errors.TABLE)


def test_a_class_below_an_entry_takes_the_nearest():
    class Late(Unavailable):
        pass

    assert errors.rule_of(Late("x")) is errors.TABLE[Unavailable]
    assert errors.rule_of(KeyError("x")).code is grpc.StatusCode.INTERNAL


@pytest.mark.parametrize("cls", [c for c in errors.TABLE if errors.TABLE[c].public is None and c is not NonFinite])
def test_errors_that_are_meant_for_callers_come_back_as_they_are(cls):
    error = returned(cls("what happened"))
    assert type(error) is cls
    assert str(error) == "what happened"


def test_an_invalid_input_comes_back_with_field_and_remedy():
    sent = CheckpointError("no such directory", field="path", value="x", remedy="export one first")
    error = returned(sent)
    assert (str(error), error.field, error.remedy) == (str(sent), "path", "export one first")


def test_the_field_of_a_job_spec_is_a_path_in_the_request():
    status = errors.to_status(ConfigError("is below 1", field="config: steps", value=0), "r")
    bad = error_details_pb2.BadRequest()
    assert any(packed.Unpack(bad) for packed in status.details)
    assert bad.field_violations[0].field == "config.steps"


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (PeerLost("gone", peer="10.0.0.7"), Unavailable),
        (LinkTimeout("late", peer="10.0.0.7"), Unavailable),
        (RemoteError("refused", peer="10.0.0.7"), RemoteError),
        (NonFinite("loss is nan", step=7), FailedPrecondition),
        (ZeroDivisionError("10.0.0.7"), RemoteError),
    ],
)
def test_errors_from_inside_come_back_by_code(error, seen):
    back = returned(error)
    assert type(back) is seen
    assert "10.0.0.7" not in str(back)


def test_retry_is_advised_exactly_where_the_table_says():
    for cls, rule in errors.TABLE.items():
        error = cls.__new__(cls)
        error.__dict__.update(field="", remedy="")
        status = errors.to_status(error, "r")
        assert ("google.rpc.RetryInfo" in kinds(status)) is (rule.retry_after_s is not None)
        assert errors.retry_after_s(Failed.with_status(status)) == rule.retry_after_s
        assert {"google.rpc.ErrorInfo", "google.rpc.RequestInfo"} <= kinds(status)


def test_texts_are_cut_to_what_trailers_carry():
    for text in ("a" * 10_000, "漢" * 10_000, "\udcff" * 10_000):
        status = errors.to_status(InvalidInput(text, field=text, remedy=text), "r")
        assert len(status.SerializeToString()) < 4096
        assert status.message


@pytest.mark.parametrize(
    ("code", "seen"),
    [
        (grpc.StatusCode.UNAVAILABLE, Unavailable),
        (grpc.StatusCode.CANCELLED, Unavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, LinkTimeout),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, ResourceExhausted),
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidInput),
        (grpc.StatusCode.UNIMPLEMENTED, RemoteError),
        (grpc.StatusCode.UNKNOWN, RemoteError),
    ],
)
def test_errors_of_grpc_itself(code, seen):
    error = errors.from_rpc_error(Failed(code, "why"), "host:1")
    assert type(error) is seen
    assert "why" in str(error)


def test_details_that_contradict_the_status_are_not_believed():
    status = errors.to_status(cluster_errors.NotFound("x"), "r")
    error = Failed(grpc.StatusCode.UNAVAILABLE, "proxy says no", status.SerializeToString())
    assert type(errors.from_rpc_error(error, "host:1")) is Unavailable
