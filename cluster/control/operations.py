"""Long-running operations on the cluster: the part of its state that the one who asked for a change watches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from actors.errors import InvalidInput
from cluster.backend import Operation, OperationState
from cluster.errors import AlreadyExists, FailedPrecondition, NotFound

_NEXT: dict[OperationState, frozenset[OperationState]] = {
    OperationState.RUNNING: frozenset({OperationState.CANCELLING, OperationState.SUCCEEDED, OperationState.FAILED}),
    OperationState.CANCELLING: frozenset({OperationState.CANCELLED, OperationState.SUCCEEDED, OperationState.FAILED}),
}


class OperationTable:
    """The newest `max_operations`, oldest first; only the newest one can be running or on its way to the stop."""

    def __init__(self, max_operations: int = 100) -> None:
        if max_operations < 1:
            raise InvalidInput("is below 1", field="max_operations", value=max_operations, remedy="use 1 or more")
        self._max_operations = max_operations
        self._operations: dict[str, Operation] = {}
        self._id_of_request: dict[str, str] = {}
        self._num_started = 0

    def start(self, kind: str, target: int, request_id: str, now: float, node: str = "") -> Operation:
        """Idempotent by request id, for as long as the operation is kept.

        `AlreadyExists` if the id came with another kind, target or node, `FailedPrecondition` while another operation
        runs.
        """
        if not request_id:
            raise InvalidInput("is empty", field="request_id", remedy="send a fresh UUID, and the same one on a retry")
        if request_id in self._id_of_request:
            return self._started_before(kind, target, request_id, node)
        if other := self.active():
            raise FailedPrecondition(f"{other.id} ({_what(other)}) is {other.state.value}; cancel it or wait")
        self._num_started += 1
        name = f"operation-{self._num_started}"
        operation = Operation(
            name, request_id, kind, OperationState.RUNNING, target, progress=0.0, message="", created_s=now, node=node
        )
        self._operations[operation.id] = operation
        self._id_of_request[request_id] = operation.id
        self._forget_old()
        return operation

    def recall(self, operations: Sequence[Operation], error: str, now: float) -> None:
        """Those of before a restart, oldest first, into an empty table: who carried out one that had not ended is gone,
        so it has failed with this error."""
        for operation in operations:
            if not operation.state.is_final:
                operation = dataclasses.replace(operation, state=OperationState.FAILED, ended_s=now, error=error)
            self._operations[operation.id] = operation
            self._id_of_request[operation.request_id] = operation.id
            self._num_started = max(self._num_started, int(operation.id.rpartition("-")[2]))
        self._forget_old()

    def get(self, operation_id: str) -> Operation:
        try:
            return self._operations[operation_id]
        except KeyError:
            raise NotFound(f"no operation {operation_id!r}") from None

    def all(self) -> Sequence[Operation]:
        """Newest first."""
        return list(reversed(self._operations.values()))

    def active(self) -> Operation | None:
        """The one that runs or is being cancelled."""
        return next((operation for operation in self._operations.values() if not operation.state.is_final), None)

    def is_cancelling(self, operation_id: str) -> bool:
        return self.get(operation_id).state is OperationState.CANCELLING

    def progress(self, operation_id: str, fraction: float, message: str) -> None:
        """Progress never falls: a fraction below the one reached changes the message only.

        A report about an operation that has ended meanwhile is late, not wrong: it is ignored.
        """
        operation = self.get(operation_id)
        if not operation.state.is_final:
            reached = min(1.0, max(operation.progress, fraction))
            self._replace(operation, progress=reached, message=message)

    def cancel(self, operation_id: str, now: float) -> Operation:
        """Whoever carries it out sees `is_cancelling` and reports `cancelled`, or an end that came first.

        `FailedPrecondition` if it is final; cancelling twice is the same as once.
        """
        operation = self.get(operation_id)
        if operation.state is not OperationState.CANCELLING:
            self._move(operation, OperationState.CANCELLING, now)
        return self.get(operation_id)

    # --- Reported by the one that carries it out: each operation has one end, and a second one is a mistake -------

    def succeeded(self, operation_id: str, now: float, prepare_s: float, stall_s: float) -> None:
        """Also of one that was being cancelled, when it was too late for that."""
        operation = self.get(operation_id)
        self._move(operation, OperationState.SUCCEEDED, now, progress=1.0, prepare_s=prepare_s, stall_s=stall_s)

    def failed(self, operation_id: str, error: str, now: float) -> None:
        self._move(self.get(operation_id), OperationState.FAILED, now, error=error)

    def cancelled(self, operation_id: str, now: float) -> None:
        self._move(self.get(operation_id), OperationState.CANCELLED, now)

    def _move(self, operation: Operation, state: OperationState, now: float, **changes: object) -> None:
        if state not in _NEXT.get(operation.state, frozenset()):
            raise FailedPrecondition(f"{operation.id} is {operation.state.value}, it cannot become {state.value}")
        self._replace(operation, state=state, ended_s=now if state.is_final else None, **changes)

    def _replace(self, operation: Operation, **changes: object) -> None:
        self._operations[operation.id] = dataclasses.replace(operation, **changes)  # type: ignore[arg-type]

    def _forget_old(self) -> None:
        while len(self._operations) > self._max_operations:
            forgotten = self._operations.pop(next(iter(self._operations)))
            del self._id_of_request[forgotten.request_id]

    def _started_before(self, kind: str, target: int, request_id: str, node: str) -> Operation:
        operation = self._operations[self._id_of_request[request_id]]
        if (operation.kind, operation.target, operation.node) != (kind, target, node):
            raise AlreadyExists(f"request id {request_id!r} was used for {operation.id}, {_what(operation)}")
        return operation


def _what(operation: Operation) -> str:
    return f"{operation.kind} {operation.node}" if operation.node else f"{operation.kind} to {operation.target}"
