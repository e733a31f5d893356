"""CUDA graphs as far as `actors.router.captured` uses them, on the CPU: what is captured is a list of operations with
their operands, and a replay does them again on the same memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from actors.router import captured

_WAITS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
"""What no graph can hold: the host would wait for the device."""


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
        self._recorder.__enter__()

    def capture_end(self) -> None:
        self._recorder.__exit__(None, None, None)

    def replay(self) -> None:
        for func, args, kwargs, out in self._recorder.operations:
            again = func(*args, **kwargs)
            returns = func._schema.returns
            if len(returns) == 1 and returns[0].alias_info is not None:
                continue  # a view, or written in place
            for place, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(place, Tensor):
                    place.copy_(new)


@contextmanager
def _stream(stream: object) -> Iterator[None]:
    yield


def use_fake_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "can_capture", lambda device: True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "stream", _stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
