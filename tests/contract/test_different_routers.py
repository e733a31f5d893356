"""A router that would make another model of the same weights is refused by name, and the others go on."""

from __future__ import annotations

import pytest
import torch

from actors.errors import InvalidInput
from actors.moe.settings import GateSettings
from actors.optim import OptimizerSettings
from actors.router.likeness import check_alike, facts_of
from actors.router.replica import Replica
from actors.router.router import Router
from actors.transport.local import LocalLink
from actors.trunk.model import ModelSource
from actors.values import Growth
from tests.families import FAMILIES
from tests.routers import Routers, routers_of

VALUES = {"model_type": "deepseek_v3", **FAMILIES["deepseek_v3"]}
SOURCE = ModelSource(values=VALUES)
GATE = GateSettings(kind="top_k", temperature=0.7)
IDS = torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(0))


def join(group: Routers, source: ModelSource, gate: GateSettings) -> None:
    router = Router(source, None, gate=gate)
    try:
        replica = Replica("router-9", router, group._find_peer)
        group.router.join("router-9", LocalLink("router-9", replica.handle))
    finally:
        router.close()


@pytest.mark.parametrize(
    ("source", "gate", "text"),
    [
        (SOURCE, GateSettings(kind="top_k"), r"model\.gate\.temperature: the router that leads has 0\.7 \(got 1\.0\)"),
        (SOURCE, GateSettings(kind="deepseek_moe"), r"model\.gate\.kind: .* has 'top_k' \(got 'deepseek_moe'\)"),
        (ModelSource(values=VALUES, dtype="float64"), GATE, r"router\.dtype: .* has 'float32' \(got 'float64'\)"),
        (
            ModelSource(values={**VALUES, "rms_norm_eps": 0.5}),
            GATE,
            r"model\.values\.rms_norm_eps: .* \(got 0\.5\); start both with one config",
        ),
        (ModelSource(values={**VALUES, "hidden_size": 64}), GATE, r"model\.values\.hidden_size: .* \(got 64\)"),
    ],
    ids=["temperature", "kind", "dtype", "epsilon", "width"],
)
def test_it_is_named_and_left_out(source: ModelSource, gate: GateSettings, text: str) -> None:
    with routers_of(SOURCE, 1, links="local", gate=GATE) as group:
        group.router.begin_run(OptimizerSettings())
        with pytest.raises(InvalidInput, match=text):
            join(group, source, gate)
        assert group.router.replicas.names == []
        assert group.router.train_step([IDS], lr=1e-2, clip_norm=1.0).step == 1
        group.add()
        assert group.router.train_step([IDS], lr=1e-2, clip_norm=1.0).step == 2
        group.agree()


def test_a_model_that_has_grown_is_the_same_model() -> None:
    with routers_of(SOURCE, 1, links="local", gate=GATE) as group:
        group.local.grow(Growth(16))
        join(group, SOURCE, GATE)
        assert group.router.replicas.names == ["router-9"]


def test_a_seed_makes_no_other_model() -> None:
    check_alike(facts_of(SOURCE, GATE), facts_of(ModelSource(values=VALUES, seed=3), GATE))
