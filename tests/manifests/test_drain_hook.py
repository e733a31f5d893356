"""The preStop hook, with a command in the place of `moe-cluster`."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from cluster.cli import parser
from tests.manifests.kustomize import K8S

HOOK = K8S / "hooks" / "drain.sh"
LIMIT_S = 30


@pytest.fixture
def run(tmp_path: Path):
    def run(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = tmp_path / "moe-cluster"
        command.write_text(f"#!/bin/bash\n{script}\n")
        command.chmod(0o755)
        defaults = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "NODE_NAME": "moe-cluster-experts-worker-x7k2p",
            "MOE_CLUSTER_TARGET": "moe-cluster:50151",
            "DRAIN_TIMEOUT_S": "300",
            "DRAIN_LOG": str(tmp_path / "log"),
        }
        environment = {key: value for key, value in (defaults | variables).items() if value}
        return subprocess.run(
            [str(HOOK)], env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )

    return run


def test_it_drains_its_own_node(run, tmp_path: Path) -> None:
    done = run(f'echo "$MOE_CLUSTER_TARGET" "$@" > {tmp_path}/seen')
    assert done.returncode == 0, done.stderr
    wanted = "moe-cluster:50151 drain --node moe-cluster-experts-worker-x7k2p --timeout-s 300\n"
    assert (tmp_path / "seen").read_text() == wanted
    assert not (tmp_path / "log").exists()


def test_the_command_line_is_one_that_ours_takes(run, tmp_path: Path) -> None:
    run(f'printf "%s\\n" "$@" > {tmp_path}/seen')
    args = parser().parse_args((tmp_path / "seen").read_text().splitlines())
    assert (args.node, args.deadline_s) == ("moe-cluster-experts-worker-x7k2p", 300)


def test_a_drain_that_fails_is_told(run, tmp_path: Path) -> None:
    assert run("exit 3").returncode == 1
    assert "moe-cluster-experts-worker-x7k2p was not drained within 300 s" in (tmp_path / "log").read_text()


def test_a_drain_that_hangs_is_ended(run, tmp_path: Path) -> None:
    began = time.monotonic()
    # `timeout` waits ten seconds longer than the command was told to.
    assert run("exec sleep 60", DRAIN_TIMEOUT_S="-9").returncode == 1
    assert time.monotonic() - began < LIMIT_S
    assert "was not drained" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("missing", ["NODE_NAME", "MOE_CLUSTER_TARGET", "DRAIN_TIMEOUT_S"])
def test_it_needs_to_be_told(missing: str, run) -> None:
    done = run("exit 0", **{missing: ""})
    assert done.returncode != 0
    assert missing in done.stderr
