"""Clusters that cannot be, and clusters that end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from actors.errors import InvalidInput
from cluster.configfile import find_config, load_cluster
from cluster.fabric import nodes
from cluster.fabric.launch import launched

pytestmark = pytest.mark.timeout(600)  # starting processes that import torch takes minutes on a busy machine

WAIT_S = 240.0
STOP_S = 20.0


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ({"experts.actors": 5, "experts.group_size": 2}, "more actors than the 4 expert groups"),
        ({"experts.group_size": 3}, "does not divide"),
    ],
)
def test_a_placement_that_cannot_be_is_named(overrides: dict[str, object], text: str) -> None:
    config = load_cluster(find_config("local_cpu"), {"model": "tiny", "front.port": 0, **overrides})
    with pytest.raises(InvalidInput, match=text), launched(config):
        pass


def test_an_embedded_cluster_runs_beside_another() -> None:
    with nodes._patience(WAIT_S):
        other = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    try:
        values = {"model": "tiny", "experts.group_size": 2, "ray.start_timeout_s": WAIT_S, "front.port": 0}
        config = load_cluster(find_config("local_cpu"), values)
        with launched(config) as running:
            assert ray.get_runtime_context().gcs_address != other.address
            assert asyncio.run(running.backend.status(timeout_s=10)).ready
            started = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
            commands = [arguments for process in started if (arguments := command_of(process))]
            assert any("raylet" in Path(arguments[0]).name for arguments in commands)
            unread = ("dashboard.py", "monitor.py")  # Ray's own, for people who do not look at an embedded cluster
            assert not [arguments for arguments in commands if any(word.endswith(unread) for word in arguments)]
        assert other.head_node is not None
        assert not other.head_node.dead_processes(), "the other cluster is left alone"
    finally:
        other.shutdown()


def command_of(process: psutil.Process) -> list[str]:
    """Empty if it has ended meanwhile, as many do that a start begins."""
    with suppress(psutil.Error):
        return process.cmdline()
    return []


_FORKS = """
import subprocess, threading
from concurrent.futures import ThreadPoolExecutor
import cluster
import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

server = grpc.server(ThreadPoolExecutor(4))
health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
port = server.add_insecure_port("127.0.0.1:0")
server.start()

def ask():
    stub = health_pb2_grpc.HealthStub(grpc.insecure_channel(f"127.0.0.1:{port}"))
    while True:
        stub.Check(health_pb2.HealthCheckRequest(), timeout=10)

for _ in range(3):
    threading.Thread(target=ask, daemon=True).start()
# As Ray starts its processes: a preexec_fn rules out vfork.
print(sum(subprocess.run(["true"], preexec_fn=lambda: None).returncode != 0 for _ in range(300)), flush=True)
__import__("os")._exit(0)
"""


def test_processes_start_while_grpc_calls_are_in_flight() -> None:
    """With gRPC's fork handlers 4 of 300 children died before they ran; a raylet among them makes a start time out."""
    env = {name: value for name, value in os.environ.items() if name != "GRPC_ENABLE_FORK_SUPPORT"}
    done = subprocess.run([sys.executable, "-c", _FORKS], capture_output=True, text=True, timeout=100, env=env)
    assert done.stdout.strip() == "0", done.stderr[-500:]


def processes_with(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("MOE_CLUSTER_TEST_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "cluster.cli", *arguments]


TINY = ("--set", "model=tiny", "--set", "experts.group_size=2", "--set", f"ray.start_timeout_s={WAIT_S}")


def wait_until_gone(mark: str) -> None:
    deadline = time.monotonic() + STOP_S
    while processes_with(mark) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert processes_with(mark) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_no_process_behind(tmp_path: Path, number: int) -> None:
    mark = uuid.uuid4().hex
    demo = subprocess.Popen(
        command("demo", "--quick", "--output", str(tmp_path), *TINY),
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "MOE_CLUSTER_TEST_MARK": mark},
        start_new_session=True,
    )
    try:
        # Before the steps, of which few are left at the signal: looking at every process takes as long as many of them.
        deadline = time.monotonic() + WAIT_S
        while len(processes_with(mark)) <= 5:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert demo.stdout is not None
        assert any("step 3/" in line for line in demo.stdout)
        # The terminal sends Ctrl-C to the whole foreground group, Ray's processes included.
        os.killpg(demo.pid, number) if number == signal.SIGINT else demo.send_signal(number)
        demo.communicate(timeout=WAIT_S)
        assert demo.returncode == 130
        wait_until_gone(mark)
    finally:
        demo.kill()
        demo.wait(10)


def test_up_detached_serves_until_down(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    env = {**os.environ, "MOE_CLUSTER_TEST_MARK": mark, "XDG_STATE_HOME": str(tmp_path)}

    def run(*arguments: str) -> dict[str, object]:
        done = subprocess.run(
            command(*arguments, "--json"), capture_output=True, text=True, timeout=WAIT_S, env=env, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)  # type: ignore[no-any-return]

    target = str(run("up", "--detach", "--set", "front.port=0", *TINY)["target"])
    try:
        assert run("status", "--target", target)["ready"] is True
        generated = run("generate", "--target", target, "--max-tokens", "4", "hello")
        assert len(generated["token_ids"]) == 4  # type: ignore[arg-type]
    finally:
        run("down", "--target", target)
    wait_until_gone(mark)
    again = subprocess.run(command("down", "--target", target), capture_output=True, text=True, timeout=WAIT_S, env=env)
    assert again.returncode == 1
    assert target in again.stderr
