"""A router actor and expert actors on GPUs of their own, placed by Ray."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from ray.cluster_utils import Cluster

from actors.optim import OptimizerSettings
from actors.reference import Reference
from cluster.config import OptimizerConfig
from cluster.configfile import find_config, load_cluster
from cluster.fabric.launch import launched
from cluster.fabric.options import EXPERT_RESOURCE, ROUTER_RESOURCE
from tests.families import save

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="a router and an expert actor need a GPU each"),
]
STEPS = [np.random.default_rng(t).integers(0, 256, (4, 64)) for t in range(6)]


@pytest.fixture
def ray_address() -> Iterator[str]:
    gpus = torch.cuda.device_count()
    head = {"num_gpus": gpus, "num_cpus": 4, "resources": {ROUTER_RESOURCE: 1, EXPERT_RESOURCE: gpus - 1}}
    cluster = Cluster(initialize_head=True, head_node_args={**head, "include_dashboard": False})
    yield cluster.address
    cluster.shutdown()


@pytest.mark.timeout(300)
def test_losses_equal_those_of_one_process(ray_address: str, tmp_path: Path) -> None:
    directory = str(save("deepseek_v3", tmp_path / "m", torch.float32))
    reference = Reference(directory)
    reference.begin_run(OptimizerSettings(lr=1e-3))
    expected = [reference.train_step([torch.tensor(b)], lr=1e-3, clip_norm=1.0)[0] for b in STEPS]
    overrides = {
        "model": {"path": directory},
        "ray.mode": "existing",
        "ray.address": ray_address,
        "experts.actors": torch.cuda.device_count() - 1,
        "experts.group_size": 2,
        "experts.device": "cuda",
        "router.device": "cuda",
    }
    with launched(load_cluster(find_config("local_cpu"), overrides)) as running:
        running.router.begin_run(OptimizerConfig(lr=1e-3))
        got = [running.router.train_step([batch], lr=1e-3, clip_norm=1.0).loss for batch in STEPS]
    np.testing.assert_allclose(got, expected, rtol=1e-3)
