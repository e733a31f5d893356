"""What holds for every call on the front, whoever answers it: one wrapper around each method.

- bytes that are not a message give INVALID_ARGUMENT (gRPC itself would give UNKNOWN and the decoder's class name);
- our own services always have a deadline, the caller's or the method's default; the servicer sees what is left;
- at most `max_concurrent` calls of our own services run at once;
- an exception becomes a status with details, and one that nobody expected leaves its traceback in the log only;
- every call of our own services leaves one log line with its request id, which the caller may choose (`x-request-id`).
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_status import rpc_status

from actors.errors import InvalidInput, MoeClusterError
from cluster.errors import ResourceExhausted, Unavailable
from cluster.service import call as calls
from cluster.service import errors
from cluster.service.call import Call
from cluster.service.codec import checks
from cluster.service.metrics.calls import CallMetrics

logger = logging.getLogger(__name__)

REQUEST_ID_KEY = "x-request-id"
OWN_PREFIX = "/moecluster.v1."
WATCH_JOB = "/moecluster.v1.TrainingService/WatchJob"
WATCH_LOAD = "/moecluster.v1.ClusterService/WatchLoad"
WATCH_OPERATION = "/moecluster.v1.ClusterService/WatchOperation"
WATCHES = (WATCH_JOB, WATCH_LOAD, WATCH_OPERATION)
DEFAULT_DEADLINE_S = 60.0
DEFAULT_DEADLINES_S: Mapping[str, float] = {
    **dict.fromkeys(WATCHES, 3600.0),
    "/moecluster.v1.InferenceService/Generate": 600.0,
    "/moecluster.v1.ClusterService/Rebalance": 1800.0,
    "/moecluster.v1.ClusterService/SaveCheckpoint": 1800.0,
    "/moecluster.v1.ClusterService/ExportModel": 1800.0,
    "/moecluster.v1.ClusterService/ImportModel": 1800.0,
}
WRITE_GRACE_S = 0.5
"""For a message that is on its way when a call ends."""

Context = Any
Behaviour = Callable[[Any, Context], Any]
Respond = Callable[[], Awaitable[Any]]


class _DeadlineError(Exception):
    """The deadline passed inside of our code; a TimeoutError from elsewhere means something else."""


class Malformed:
    """Stands for a request that could not be decoded, until there is a context to refuse it with."""


class FrontInterceptor(grpc.aio.ServerInterceptor):
    def __init__(self, *, max_concurrent: int, metrics: CallMetrics) -> None:
        self._max_concurrent, self._metrics = max_concurrent, metrics
        self._running = 0
        self._watches: set[asyncio.Timeout] = set()
        self._draining = False

    def drain(self) -> None:
        """Ends every watch with UNAVAILABLE: it resumes elsewhere without loss, so stopping need not wait for it."""
        self._draining = True
        for limit in self._watches:
            limit.reschedule(asyncio.get_running_loop().time())

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:  # no such method: gRPC answers UNIMPLEMENTED
            return None
        return self._wrapped(handler, handler_call_details.method)

    def _wrapped(self, handler: Any, method: str) -> grpc.RpcMethodHandler:
        behaviour = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[handler.request_streaming, handler.response_streaming]
        respond = _stream if handler.response_streaming else _unary
        admit = self._logged if method.startswith(OWN_PREFIX) else self._translated

        async def answer(request: Any, context: Context) -> Any:
            call = _call(method, context)
            calls.enter(call)
            context.set_trailing_metadata(((REQUEST_ID_KEY, call.request_id),))
            checked = _checked(request) if handler.request_streaming else request
            return await admit(call, context, lambda: respond(behaviour, checked, context))

        return make(answer, _tolerant(handler.request_deserializer), handler.response_serializer)

    async def _logged(self, call: Call, context: Context, respond: Respond) -> Any:
        outcome = "CANCELLED"
        self._metrics.begun()
        try:
            response = await self._translated(call, context, lambda: self._limited(call, respond))
            outcome = "OK"
            return response
        except grpc.aio.AbortError:
            outcome = context.code().name
            raise
        finally:
            elapsed_s = time.monotonic() - call.started_s
            self._metrics.ended(call.method, outcome, elapsed_s)
            by = f" by {calls.caller()}" if calls.caller() else ""
            logger.info("%s %s in %.1f ms, request %s%s", call.method, outcome, 1e3 * elapsed_s, call.request_id, by)

    async def _translated(self, call: Call, context: Context, respond: Respond) -> Any:
        try:
            return await respond()
        except grpc.aio.BaseError:  # gRPC's own: aborted already, or the caller is gone
            raise
        except _DeadlineError:
            status = errors.deadline_status(call.deadline_s - call.started_s, call.request_id)
        except Exception as error:
            _log_unless_public(error, call)
            status = errors.to_status(error, call.request_id)
        return await context.abort_with_status(rpc_status.to_status(status))

    async def _limited(self, call: Call, respond: Respond) -> Any:
        """Holds the call to its deadline, and all calls together to `max_concurrent`."""
        if self._running >= self._max_concurrent:
            raise ResourceExhausted(f"{self._max_concurrent} calls are running, which is the limit; try again")
        self._running += 1
        limit = asyncio.timeout(call.remaining_s)
        try:
            async with limit:
                if call.method in WATCHES:
                    self._watches.add(limit)
                try:
                    return await respond()
                finally:
                    self._watches.discard(limit)
        except TimeoutError as error:
            if not limit.expired():
                raise
            if self._draining:
                raise Unavailable("the front is stopping; resume the watch on the next one") from error
            raise _DeadlineError from error
        finally:
            self._running -= 1


def _call(method: str, context: Context) -> Call:
    now = time.monotonic()
    given_s = context.time_remaining()
    own_s = DEFAULT_DEADLINES_S.get(method, DEFAULT_DEADLINE_S) if method.startswith(OWN_PREFIX) else math.inf
    return Call(method, _request_id(context), now + (own_s if given_s is None else given_s), now)


def _request_id(context: Context) -> str:
    """The caller's, if it is fit for a log line, or a new one."""
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID_KEY and isinstance(value, str) and checks.is_identifier(value):
            return value
    return uuid.uuid4().hex


def _tolerant(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def tolerant(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return Malformed()

    return tolerant


async def _unary(behaviour: Behaviour, request: Any, context: Context) -> Any:
    _refuse_malformed(request)
    return await behaviour(request, context)


async def _stream(behaviour: Behaviour, request: Any, context: Context) -> None:
    """Writes the responses itself: a cancelled call then ends inside of this coroutine, which closes the servicer's
    generator at once. One that gRPC iterates would wait for the garbage collector."""
    _refuse_malformed(request)
    if not inspect.isasyncgenfunction(behaviour):
        await behaviour(request, context)
        return
    async with calls.closing(behaviour(request, context)) as responses:
        async for response in responses:
            await _write(context, response)


async def _write(context: Context, response: Any) -> None:
    """Not given up halfway: gRPC sends no status while a message is on its way, and the caller would wait for one."""
    writing = asyncio.ensure_future(context.write(response))
    try:
        await asyncio.shield(writing)
    except asyncio.CancelledError:
        await asyncio.wait([writing], timeout=WRITE_GRACE_S)  # longer only if the caller does not read
        writing.cancel()
        raise


async def _checked(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        _refuse_malformed(request)
        yield request


def _refuse_malformed(request: Any) -> None:
    if isinstance(request, Malformed):
        raise InvalidInput("the bytes of the request are not a message of this method")


def _log_unless_public(error: Exception, call: Call) -> None:
    """Keeps for us what the caller is not told."""
    if not isinstance(error, MoeClusterError):
        logger.error("unexpected error in %s, request %s", call.method, call.request_id, exc_info=error)
    elif errors.rule_of(error).public is not None:
        logger.warning("%s in %s, request %s: %s", type(error).__name__, call.method, call.request_id, error)
