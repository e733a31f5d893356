"""The split changes nothing: cluster against one process of plain transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from actors.optim import OptimizerSettings
from actors.trunk.model import ModelSource
from actors.values import StepReport
from cluster.cli import main
from cluster.config import ModelConfig, OptimizerConfig
from cluster.configfile import find_config, load_model
from cluster.jobs.batches import MicroBatch
from cluster.verify import ClusterPort, Settings, verify
from tests.local import LocalCluster, cluster

BARS = {"float64": (1e-9, 1e-8), "float32": (1e-4, float("inf"))}
"""dtype -> (relative loss, absolute weight)"""


class _Port:
    """`ClusterPort` over the cluster in this process."""

    def __init__(self, local: LocalCluster) -> None:
        self._router = local.router

    def begin_run(self, optimizer: OptimizerConfig) -> None:
        values = asdict(optimizer)
        self._router.begin_run(OptimizerSettings(**{k: values[k] for k in OptimizerSettings().to_dict()}))

    def train_step(self, microbatches: Sequence[MicroBatch], *, lr: float, clip_norm: float) -> StepReport:
        return self._router.train_step([torch.tensor(m) for m in microbatches], lr=lr, clip_norm=clip_norm)

    def logits(self, ids: MicroBatch) -> torch.Tensor:
        return self._router.serving.logits(torch.tensor(ids))

    def export(self, directory: str) -> object:
        return self._router.export(Path(directory))


def opener(num_actors: int) -> object:
    @contextmanager
    def open_cluster(model: ModelConfig, dtype: str) -> Iterator[ClusterPort]:
        with cluster(ModelSource(path=model.path, dtype=dtype), num_actors, links="socket") as local:
            yield _Port(local)

    return open_cluster


@pytest.mark.parametrize("num_actors", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", BARS)
def test_twenty_steps_equal_one_process(num_actors: int, dtype: str) -> None:
    model = load_model(find_config("tiny", "models"))
    open_cluster: object = opener(num_actors)
    found = verify(model, open_cluster, Settings(steps=20, dtype=dtype))  # type: ignore[arg-type]
    loss_bar, weight_bar = BARS[dtype]
    assert found.loss_rel_diff_max < loss_bar
    assert found.weight_abs_diff_max < weight_bar
    assert found.logit_abs_diff_max < 1e-5
    assert found.grad_norm_rel_diff_max < 100 * loss_bar


@pytest.mark.timeout(600)  # starting processes that import torch takes minutes on a busy machine
def test_the_command_on_real_actors(capsys: pytest.CaptureFixture[str]) -> None:
    import json

    assert main(["verify", "--actors", "3", "--steps", "5", "--json", "--set", "ray.start_timeout_s=240"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {
        "steps",
        "loss_rel_diff_max",
        "weight_abs_diff_max",
        "logit_abs_diff_max",
        "grad_norm_rel_diff_max",
    }
    assert found["steps"] == 5
    assert found["loss_rel_diff_max"] < 1e-9
    assert found["weight_abs_diff_max"] < 1e-8
