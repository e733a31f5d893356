"""Snapshots on peers, asynchronous and sparse updates, compression and pins, with each other and with deaths.

Over the fabric's own code, hosts and a router in this process; no Ray starts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.compress.settings import CompressionSettings
from actors.errors import VersionGone
from actors.expert.updates import Brake
from actors.optim import OptimizerSettings
from actors.trunk.model import ModelSource
from actors.values import VersionChoice
from cluster.fabric import pins as pins_module
from cluster.fabric.pins import Pins
from tests.contract.test_copies import copies_agree
from tests.contract.test_kept import OPTIMIZER, STEPS, Bench, Remote, bench, no_ray, same
from tests.families import save

__all__ = ["no_ray"]
IDS = torch.randint(0, 256, (1, 12), generator=torch.Generator().manual_seed(99))
PROD = VersionChoice(pin="prod")
COMPRESSED = CompressionSettings("powersgd", rank=2, quantised=True, copies=True)
GENTLE = replace(OPTIMIZER, eps=1e-4)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    directory = save("deepseek_v3", tmp_path_factory.mktemp("model") / "m", torch.float64)
    return ModelSource(path=str(directory), dtype="float64")


def behind(here: Bench, updates: int) -> None:
    """Every run has the same staleness then: so many updates stay pending until all are wanted, as by a snapshot."""
    for host in here.local.hosts:
        host.updates.brake = Brake(hold=updates)


def unbroken(
    source: ModelSource, root: Path, optimizer: OptimizerSettings, every_steps: int = 5
) -> Mapping[int, float]:
    with bench(source, root, every_steps=every_steps, optimizer=optimizer) as here:
        behind(here, optimizer.staleness)
        here.train(*range(1, STEPS + 1))
        return here.losses


@pytest.mark.parametrize(
    "optimizer",
    [
        replace(OPTIMIZER, staleness=2),
        replace(OPTIMIZER, staleness=1, experts="muon", sparse="skip"),
        replace(OPTIMIZER, sparse="exact"),
        replace(OPTIMIZER, staleness=2, delay_correction=0.5),
    ],
    ids=["behind", "behind, muon, skip", "put off", "behind, corrected"],
)
def test_what_comes_back_from_a_peer_has_every_update(
    source: ModelSource, tmp_path: Path, optimizer: OptimizerSettings
) -> None:
    expected = unbroken(source, tmp_path / "a", optimizer)
    with bench(source, tmp_path / "b", optimizer=optimizer) as here:
        behind(here, optimizer.staleness)
        here.train(*range(1, 8))
        assert max(host.updates.max_lag for host in here.local.hosts) >= optimizer.staleness, "updates were pending"
        here.kill("expert-1")
        assert here.go_back() == 5
        assert all(m.host.updates.max_lag == 0 for m in here.local.members.values() if not m.dead)
        here.train(*range(6, STEPS + 1))
        same(here.losses, expected)
        counts = {host.holdings.snapshot(host.groups, STEPS, 0).updates for host in _drained(here)}
        assert counts == {STEPS}, "no update is lost, and none is made twice"


def _drained(here: Bench) -> Iterator[Any]:
    here.local.router.status()  # the last commit is done
    for member in here.local.members.values():
        if not member.dead:
            member.host.updates.drain()
            yield member.host


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_return_forgets_what_compression_has_left_out(source: ModelSource, tmp_path: Path, staleness: int) -> None:
    """It is of steps that do not count any more. So two returns to one snapshot are followed by the same steps."""
    optimizer = replace(GENTLE, staleness=staleness)
    with bench(
        source, tmp_path, actors=4, redundancy=2, group_size=2, optimizer=optimizer, compression=COMPRESSED
    ) as here:
        behind(here, staleness)
        here.train(*range(1, 8))
        assert all(host.state.copies.num_bytes() > 0 for host in here.local.hosts)
        found = []
        for _ in range(2):
            assert here.recovery._go_back(here.job) == 5
            here.local.placement = here.coordinator.placement
            assert all(host.state.copies.num_bytes() == 0 for host in here.local.hosts)
            here.local.router.continue_run(here.coordinator.jobs.get(here.job).config.balance, COMPRESSED)
            reports = []
            for batch in (6, 7, 8):
                here.train(batch)
                reports.append(here.losses[batch])
            assert len(list(_drained(here))) == 4
            copies_agree(here.local)
            found.append(reports)
        assert found[0] == found[1]


def test_groups_and_all_their_copies_come_back_and_travel_compressed_again(source: ModelSource, tmp_path: Path) -> None:
    with bench(
        source, tmp_path, actors=4, redundancy=2, group_size=2, optimizer=GENTLE, compression=COMPRESSED
    ) as here:
        here.train(*range(1, 7))
        kept = here.snapshots.newest()
        assert kept is not None
        parts = [{holder.name for holder in held} for held in kept.holders.values()]
        here.kill(*next(held for held in here.local.placement.holders if not any(part <= set(held) for part in parts)))
        assert here.go_back() == 5
        here.train(*range(6, STEPS + 1))
        copies_agree(here.local)
        assert all(loss < 7 for loss in here.losses.values())


# -- pins -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pinned_bench(
    source: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Bench, list[Pins]]]:
    """A cluster whose groups have copies, in an asynchronous job, and the pins of its coordinator."""
    monkeypatch.setattr(pins_module, "call", lambda who, ref, timeout_s: ref())
    optimizer = replace(GENTLE, staleness=2)
    with bench(source, tmp_path, redundancy=2, group_size=2, optimizer=optimizer, compression=COMPRESSED) as here:
        behind(here, 2)
        router = here.local.router
        here.crew.router.pin = Remote(lambda name, ttl_s: router.pin(name, ttl_s))
        here.crew.router.keep_pins = Remote(router.keep_pins, at_once=True)
        here.crew.router.forget_pin = Remote(router.serving.pins.forget, at_once=True)
        crew: Any = here.crew
        crew.pins_of = lambda leader: (time.monotonic() + 60.0, tuple(router.vitals()["pins"]))
        yield here, [Pins(crew, 2)]


def logits(here: Bench, choice: VersionChoice = PROD) -> torch.Tensor:
    return here.local.router.serving.logits(IDS, choice)


def test_a_pin_outlives_the_coordinator_and_a_return_to_memory(pinned_bench: tuple[Bench, list[Pins]]) -> None:
    here, (pins,) = pinned_bench
    here.train(1, 2, 3)
    pin = pins.pin("prod", 0.0, 3, 10.0)
    assert pin.version == 3
    expected = logits(here)
    here.train(4, 5, 6, 7)
    successor = Pins(here.crew, 2)  # type: ignore[arg-type]
    assert successor.all() == ()
    here.come_back()
    successor.look()
    assert successor.all() == (pin,), "as the router has it"
    assert torch.equal(logits(here), expected)
    assert here.recovery._go_back(here.job) == 5
    here.local.router.continue_run(here.coordinator.jobs.get(here.job).config.balance, COMPRESSED)
    successor.look()
    assert successor.all() == (pin,)
    assert torch.equal(logits(here), expected), "the return is to version 5, and its pin stays at 3"
    here.train(6, 7)
    assert torch.equal(logits(here), expected)
    behind(here, 0)
    assert not torch.equal(logits(here, VersionChoice()), expected)


def test_a_pin_whose_experts_died_while_there_was_no_coordinator_is_given_up(
    pinned_bench: tuple[Bench, list[Pins]],
) -> None:
    here, (pins,) = pinned_bench
    here.train(1, 2)
    pins.pin("prod", 0.0, 2, 10.0)
    here.train(3)
    first, second, *_ = here.local.members
    here.local.members[first].kill()
    successor = Pins(here.crew, 2)  # type: ignore[arg-type]
    successor.look()
    assert [pin.name for pin in successor.all()] == ["prod"], "a copy of each group is alive"
    here.local.members[second].kill()
    successor.look()
    assert successor.all() == ()
    with pytest.raises(VersionGone, match="pin prod is not kept; there are the newest, 3"):
        logits(here)
