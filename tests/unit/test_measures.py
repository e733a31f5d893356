from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from actors import gpu
from actors.gpu import gpu_use
from actors.transport.contract import Link, Traffic
from actors.transport.local import LocalLink
from actors.transport.message import Message
from actors.transport.meter import Meter
from cluster.backend import GpuUse, LinkUse
from cluster.fabric.measures import status_fields


def opened(kind: str = "local") -> Link:
    link = LocalLink("peer", lambda peer, question: Message("ok", {}, question.tensors * 2))
    link.kind = kind
    return link


def ask(link: Link, num_bytes: int) -> None:
    link.call(Message("echo", {}, (torch.zeros(num_bytes, dtype=torch.uint8),)), 1.0)


def test_a_meter_counts_by_kind_and_does_not_forget_links_that_ended() -> None:
    meter = Meter()
    first, other = meter.watch(opened()), meter.watch(opened("socket/tcp"))
    ask(first, 10)
    ask(other, 1)
    first.close()
    assert meter.totals()["local"].bytes_sent == 10
    second = meter.watch(opened())
    ask(second, 5)
    ask(second, 5)
    totals = meter.totals()
    assert totals["socket/tcp"].bytes_sent == 1
    assert (totals["local"].messages_sent, totals["local"].bytes_sent, totals["local"].bytes_received) == (3, 20, 40)
    second.close()
    meter.watch(opened())
    assert meter.totals()["local"].bytes_received == 40


def test_waits_for_answers_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(100.0, 0.5)
    monkeypatch.setattr("actors.transport.contract.time", SimpleNamespace(monotonic=lambda: next(clock)))
    link = opened()
    ask(link, 1)
    assert link.traffic.wait_s == 0.5
    assert link.traffic == Traffic(1, 1, 1, 2, 0.5)


def test_without_a_gpu_there_is_nothing_to_say() -> None:
    assert gpu_use("cpu") is None
    if not torch.cuda.is_available():
        assert gpu_use("cuda") is None


def test_a_gpu_tells_its_memory_and_an_unhappy_driver_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30, 80))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 25)
    memory = {"used_bytes": 50, "total_bytes": 80, "allocated_bytes": 20}
    for is_there, busy_ratio in ((True, 0.25), (False, None)):
        monkeypatch.setattr(gpu, "_has_nvml", lambda is_there=is_there: is_there)
        assert gpu_use("cuda") == {**memory, "busy_ratio": busy_ratio}

    def fail(device: str) -> tuple[int, int]:
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    assert gpu_use("cuda") is None


def test_what_an_actor_tells_becomes_its_status() -> None:
    traffic = {"messages_sent": 1, "bytes_sent": 2, "messages_received": 3, "bytes_received": 4, "wait_s": 0.5}
    use = {"used_bytes": 50, "total_bytes": 80, "allocated_bytes": 20, "busy_ratio": None}
    told = {"zone": "z", "traffic": {"socket/ipc": traffic}, "gpu": use, "num_waiting": 3, "queue_s": 1.5}
    assert status_fields(told) == {
        "zone": "z",
        "link_use": (LinkUse("socket/ipc", 2, 4, 0.5),),
        "gpu": GpuUse(50, 80, 20),
        "num_waiting": 3,
        "queue_s": 1.5,
    }
    assert status_fields({}) == {"zone": "", "link_use": (), "gpu": None, "num_waiting": 0, "queue_s": 0.0}
