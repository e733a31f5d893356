"""Links that end while their actors live: they are opened again, and nothing is lost."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch

from actors.errors import StepAborted
from actors.optim import OptimizerSettings
from actors.trunk.model import ModelSource
from cluster.chaos.cuts import cut_links
from tests.families import save
from tests.local import LocalCluster, cluster

IDS = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    directory = save("deepseek_v3", tmp_path_factory.mktemp("model") / "m", torch.float64)
    return ModelSource(path=str(directory), dtype="float64")


def losses(local: LocalCluster, steps: int) -> list[float]:
    return [local.router.train_step([IDS], lr=1e-2, clip_norm=1.0).loss for _ in range(steps)]


@pytest.mark.parametrize("redundancy", [1, 2])
def test_a_step_runs_again_over_new_links(source: ModelSource, redundancy: int) -> None:
    with cluster(source, 2, redundancy=redundancy) as local:
        local.router.begin_run(OptimizerSettings())
        expected = losses(local, 3)
    with cluster(source, 2, redundancy=redundancy, links="socket") as local:
        local.router.begin_run(OptimizerSettings())
        found = losses(local, 1)
        assert cut_links(os.getpid()) >= 2 * 2, "two links to each of two actors"
        report = local.router.train_step([IDS], lr=1e-2, clip_norm=1.0)
        assert report.retries == 1, "hosts open their links to each other within it"
        assert [*found, report.loss, *losses(local, 1)] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("redundancy", [1, 2])
def test_requests_go_on_over_new_links(source: ModelSource, redundancy: int) -> None:
    with cluster(source, 2, redundancy=redundancy, links="socket") as local:
        expected = local.router.serving.logits(IDS)
        cut_links(os.getpid())
        try:
            found = local.router.serving.logits(IDS)
        except StepAborted:  # cut in the middle of a pass, with those who could stand in
            found = local.router.serving.logits(IDS)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        assert len(local.router.status()) == 2, "both serve again"


def test_listening_sockets_and_other_connections_stay(source: ModelSource) -> None:

    here, there = socket.socketpair()
    with here, there, cluster(source, 1, links="socket") as local:
        cut_links(os.getpid())
        here.sendall(b"x")
        there.settimeout(10.0)
        assert there.recv(1) == b"x"
        local.members["expert-0"].open().close()


HANDLES = """
import os
import torch
from actors.transport.message import Message
from actors.transport.socket import SocketLink, SocketServer
server = SocketServer("e", lambda peer, question: Message("ok"), max_bytes=1 << 24)
server.start()
link = SocketLink("e", server.address, name="r", max_bytes=1 << 24, timeout_s=20.0)
for size in (1, 1 << 20):
    link.call(Message("x", {}, (torch.zeros(size),)), 20.0)
    print(len(os.listdir("/proc/self/fd")))
"""


def test_large_messages_take_no_more_handles_than_small_ones() -> None:
    ran = subprocess.run([sys.executable, "-c", HANDLES], capture_output=True, text=True, timeout=120.0, check=True)
    small, large = map(int, ran.stdout.split())
    assert large == small


def test_a_process_that_has_ended_has_no_links() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(30.0)
    assert cut_links(process.pid) == 0
