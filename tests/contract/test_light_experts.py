"""An expert actor's process that was told the model's layout: it takes groups over and computes them, and has imported
neither transformers nor anything else that only others need."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from actors.optim import OptimizerSettings
from actors.router.roster import Peer, Roster
from actors.transport.socket import SocketLink
from actors.trunk.init import initial_experts
from actors.trunk.layout import ModelLayout, layout_of
from actors.trunk.model import ModelSource, skeleton
from actors.values import Address, Placement
from tests.families import FAMILIES
from tests.local import MAX_BYTES, LocalCluster, cluster

SOURCE = ModelSource(values={"model_type": "deepseek_v3", **FAMILIES["deepseek_v3"]}, dtype="float64")
BATCHES = [torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(t)) for t in range(4)]
ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 60.0
HEAVY = {"transformers", "tokenizers", "ray", "grpc", "pandas", "pyarrow", "matplotlib", "rich", "tensorboard", "sympy"}

WORKER = """
import json, sys
from cluster.fabric.workertools import import_torch
import_torch(1)
from actors.expert.host import ExpertHost
from actors.moe.form import ExpertForm
from actors.transport.socket import SocketLink, SocketServer
from actors.trunk.draws import Draw
from actors.trunk.layout import LayerLayout, ModelLayout
from actors.trunk.source import ModelSource
from actors.values import Address
import cluster.checkpoint.memory, cluster.checkpoint.state  # what it needs to save and to restore
layout, owner, groups, limit, timeout_s = eval(sys.argv[1])
def open_link(name, address):
    return SocketLink(name, address, name="light", max_bytes=limit, timeout_s=timeout_s)
source = ModelSource(values={"model_type": "nobody reads this"}, dtype="float64")
host = ExpertHost("light", source, (), group_size=2, open_peer=open_link, timeout_s=timeout_s, layout=layout)
servers = [SocketServer("light", handler, max_bytes=limit) for handler in (host.handle, host.exchange.handle)]
for server in servers:
    server.start()
for group in groups:
    host.placing.arrive(group, *owner, servers[1].address, timeout_s)
print(json.dumps([vars(server.address) for server in servers]), flush=True)
sys.stdin.readline()
for server in servers:
    server.stop()
host.close()
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})), flush=True)
"""


class Worker:
    """The process; it holds copies of all groups when it is entered."""

    def __init__(self, local: LocalCluster, layout: ModelLayout) -> None:
        owner = local.members["expert-0"]
        told = layout, (owner.name, owner.exchange_address), range(local.placement.num_groups), MAX_BYTES, TIMEOUT_S
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", WORKER, repr(told)], cwd=ROOT, **pipes)
        self._line = self.process.stdout.readline
        addresses = json.loads(self._line())
        self.address, self.exchange = (Address(**address) for address in addresses)

    def open(self) -> SocketLink:
        return SocketLink("light", self.address, name="router", max_bytes=MAX_BYTES, timeout_s=TIMEOUT_S)

    def end(self) -> set[str]:
        """-> packages that it has imported."""
        out, _ = self.process.communicate("\n", timeout=TIMEOUT_S)
        return set(json.loads(out))


@contextmanager
def worker(local: LocalCluster, layout: ModelLayout) -> Iterator[Worker]:
    started = Worker(local, layout)
    try:
        yield started
    finally:
        started.process.kill()
        started.process.wait(TIMEOUT_S)


def train(local: LocalCluster, batches: list[torch.Tensor]) -> list[float]:
    return [local.router.train_step([batch], lr=1e-3, clip_norm=1.0).loss for batch in batches]


def test_an_expert_actor_that_takes_over_has_not_imported_transformers() -> None:
    layout = layout_of(skeleton(SOURCE))
    assert layout is not None
    with cluster(SOURCE, 1) as undisturbed:
        undisturbed.router.begin_run(OptimizerSettings())
        expected = train(undisturbed, BATCHES)
    with cluster(SOURCE, 1, links="socket") as local:
        local.router.begin_run(OptimizerSettings())
        losses = train(local, BATCHES[:2])
        with worker(local, layout) as light:
            placement = Placement(local.placement.epoch + 1, (("light",),) * local.placement.num_groups, 2)
            local.router.placing.adopt(Roster(placement, {"light": Peer(light.open, light.exchange)}))
            losses += train(local, BATCHES[2:])
            assert light.end() & HEAVY == set()
    assert losses == expected


SEEDED = """
import json, sys
from actors.expert.host import ExpertHost
from actors.moe.form import ExpertForm
from actors.trunk.draws import Draw
from actors.trunk.layout import LayerLayout, ModelLayout
from actors.trunk.source import ModelSource
layout, groups = eval(sys.argv[1])
source = ModelSource(values={"model_type": "nobody reads this"}, seed=5, dtype="float64")
host = ExpertHost("light", source, groups, group_size=2, layout=layout)
def weights_of(group, layer):
    tensors, _ = host.state.holdings.read(group, layer)  # each weight with its two moments
    names = host.state.holdings.stacks[layer].names
    return {name: tensor.tolist() for name, tensor in zip(names, tensors[::3], strict=True)}
weights = [weights_of(group, layer) for group in groups for layer in range(len(layout.layers))]
print(json.dumps([weights, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def test_weights_from_a_seed_are_the_same_without_transformers() -> None:
    source, groups = replace(SOURCE, seed=5), (1, 2)
    model = skeleton(source)
    told = repr((layout_of(model), groups))
    done = subprocess.run(
        [sys.executable, "-c", SEEDED, told], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr
    weights, modules = json.loads(done.stdout)
    expected = []
    for group in groups:
        for layer in range(len(model.layers)):
            drawn = initial_experts(model, layer, [group], 2, seed=5)
            expected.append({name: tensor.tolist() for name, tensor in drawn.items()})
    assert weights == expected
    assert HEAVY & set(modules) == set()


def test_whoever_starts_actors_imports_their_edges_without_what_only_they_need() -> None:
    code = "import sys, cluster.fabric.expertworker, cluster.fabric.routerworker; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    modules = set(done.stdout.split())
    assert "cluster.fabric.expertworker" in modules
    assert ({*HEAVY, "torch", "ray.data"} - {"ray"}) & modules == set()
