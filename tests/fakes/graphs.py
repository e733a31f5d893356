"""CUDA graphs as far as `actors.router.captured` uses them, on the CPU: what is captured is a list of operations with
their operands, and a replay does them again on the same memory."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from actors.router import captured
from actors.transport.payload.contract import Way

_WAITS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
"""What no graph can hold: the host would wait for the device."""


_here = threading.local()
TIMEOUT_S = 30.0


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _WAITS:
            raise RuntimeError(f"{func} waits for the device")
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out


class FakeGraph:
    def __init__(self) -> None:
        self._recorder = _Recorder()

    def capture_begin(self, *, pool: object, capture_error_mode: str) -> None:
        _here.recorder = self._recorder
        self._recorder.__enter__()

    def capture_end(self) -> None:
        self._recorder.__exit__(None, None, None)
        _here.recorder = None

    def replay(self) -> None:
        """In a thread of the stream, where it waits for another graph; otherwise at once."""
        stream = getattr(_here, "stream", None)
        if stream is None or not any(func is _call for func, *_ in self._recorder.operations):
            self._replay()
            return
        stream.then(self._replay)

    @torch.no_grad()
    def _replay(self) -> None:
        for func, args, kwargs, out in self._recorder.operations:
            again = func(*args, **kwargs)
            if func is _call:
                continue
            returns = func._schema.returns
            if len(returns) == 1 and returns[0].alias_info is not None:
                continue  # a view, or written in place
            for place, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(place, Tensor):
                    place.copy_(new)


def _call(what: Callable[[], None]) -> None:
    what()


class FakeWay(Way):
    """One end of a way between two graphs."""

    def __init__(self, out: queue.Queue[Tensor], into: queue.Queue[Tensor]) -> None:
        self._out, self._in = out, into
        self.is_ended = False

    @classmethod
    def pair(cls) -> tuple[FakeWay, FakeWay]:
        there: queue.Queue[Tensor] = queue.Queue()
        back: queue.Queue[Tensor] = queue.Queue()
        return cls(there, back), cls(back, there)

    @property
    def is_over(self) -> bool:
        return self.is_ended

    def send(self, tensor: Tensor) -> FakeWay:
        return self._do(lambda: self._out.put(tensor.clone()))

    def receive(self, room: Tensor) -> FakeWay:
        def take() -> None:
            arrived = self._in.get(timeout=TIMEOUT_S)
            room.view(-1).view(torch.uint8).copy_(arrived.view(-1).view(torch.uint8))

        return self._do(take)

    def wait(self) -> None:
        """Of what was sent or received, which is through."""

    def end(self) -> None:
        self.is_ended = True

    def when_over(self, drop: Callable[[], None]) -> None:
        pass

    def _do(self, what: Callable[[], None]) -> FakeWay:
        recorder, stream = getattr(_here, "recorder", None), getattr(_here, "stream", None)
        if recorder is not None:
            recorder.operations.append((_call, (what,), {}, None))
        elif stream is not None:
            stream.then(what)
        else:
            what()
        return self


class FakeStream:
    """Everything is done at once, but graphs that wait for others."""

    def __init__(self, device: object = None) -> None:
        self.thread: threading.Thread | None = None

    def then(self, what: Callable[[], object]) -> None:
        """In a thread, once what is under way here is through."""
        before = self.thread

        def run() -> None:
            if before is not None:
                before.join(TIMEOUT_S)
            what()

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def wait_stream(self, other: FakeStream) -> None:
        if other.thread is not None:
            other.thread.join(TIMEOUT_S)

    def wait_event(self, event: FakeEvent) -> None:
        event.synchronize()


class FakeEvent:
    def __init__(self) -> None:
        self.thread: threading.Thread | None = None

    def record(self, stream: FakeStream) -> None:
        self.thread = stream.thread

    def query(self) -> bool:
        return self.thread is None or not self.thread.is_alive()

    def synchronize(self) -> None:
        if self.thread is not None:
            self.thread.join(TIMEOUT_S)


class _Behind(TorchDispatchMode):
    """A copy comes after what its stream has still to do."""

    def __init__(self, stream: FakeStream) -> None:
        super().__init__()
        self._stream = stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.copy_.default or self._stream.thread is None:
            return func(*args, **(kwargs or {}))
        self._stream.then(lambda: func(*args, **(kwargs or {})))
        return args[0]


@contextmanager
def _stream(stream: FakeStream) -> Iterator[None]:
    _here.stream = stream
    try:
        with _Behind(stream):
            yield
    finally:
        _here.stream = None


@contextmanager
def _device(device: object) -> Iterator[None]:
    yield


def use_fake_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "can_capture", lambda device: True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "stream", _stream)
    monkeypatch.setattr(torch.cuda, "device", _device)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
