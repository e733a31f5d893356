"""Pinned versions: their outputs never change while training goes on, and the newest's do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from actors.errors import InvalidInput, StepAborted, VersionGone
from actors.moe.cache import CacheSettings
from actors.moe.settings import GateSettings
from actors.optim import OptimizerSettings
from actors.snapshots import Key, SavedState, Snapshot
from actors.trunk.model import ModelSource
from actors.values import Growth, Sampling, VersionChoice
from tests.families import FAMILIES
from tests.local import LocalCluster, cluster
from tests.routers import PIECE_BYTES, Routers

SOURCE = ModelSource(values={"model_type": "deepseek_v3", **FAMILIES["deepseek_v3"]}, dtype="float32")
BATCHES = [torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(t)) for t in range(8)]
IDS = BATCHES[0][:2]
PROMPT = BATCHES[1][0, :5].tolist()
GATE = GateSettings(kind="top_k", attention=True)
"""With parameters of its own, and something to keep of each session."""
V2 = VersionChoice(pinned=2)


def train(local: LocalCluster, count: int) -> None:
    for _ in range(count):
        batch = BATCHES[local.router.version % len(BATCHES)]
        local.router.train_step([batch], lr=1e-2, clip_norm=1.0, bias_speed=1e-3)


def begin(local: LocalCluster, settings: OptimizerSettings = OptimizerSettings()) -> None:  # noqa: B008 - frozen
    local.router.begin_run(settings)
    train(local, 2)


def outputs(local: LocalCluster, choice: VersionChoice) -> tuple[Tensor, list[float], list[float], list[int]]:
    """-> logits, log-probabilities, embedding, greedy tokens."""
    serving = local.router.serving
    logprobs, scored = serving.score(PROMPT, choice)
    embedding, embedded = serving.embed(PROMPT, choice)
    events = list(serving.generate(PROMPT, Sampling(max_tokens=6), timeout_s=20, choice=choice))
    assert len({scored, embedded, *(event.version for event in events)}) == 1
    assert scored == (local.router.version if choice.is_newest else 2)
    return serving.logits(IDS, choice), logprobs, embedding, [event.token for event in events]


def same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return torch.equal(first[0], second[0]) and first[1:] == second[1:]


@pytest.mark.parametrize("links", ["local", "socket"])
@pytest.mark.parametrize("gate", [None, GATE], ids=["own gate", "ours"])
def test_a_pinned_version_stays_and_the_newest_goes_on(links: str, gate: GateSettings | None) -> None:
    with cluster(SOURCE, 2, links=links, gate=gate) as local:
        begin(local)
        before = outputs(local, VersionChoice())
        local.router.pin("prod")
        assert same(outputs(local, V2), before)
        for _ in range(2):
            train(local, 2)
            assert same(outputs(local, V2), before), "bit for bit"
            assert same(outputs(local, VersionChoice(pin="prod")), before)
            newest = outputs(local, VersionChoice())
            assert not torch.equal(newest[0], before[0])
            assert newest[1] != before[1]


@pytest.mark.parametrize(
    "settings",
    [OptimizerSettings(), OptimizerSettings(sparse="exact"), OptimizerSettings(staleness=2)],
    ids=["in place", "put off", "beside"],
)
def test_training_is_that_of_a_run_without_pins(settings: OptimizerSettings) -> None:
    """Whichever way the updates write."""
    with cluster(SOURCE, 2) as pinned, cluster(SOURCE, 2) as plain:
        for local in (pinned, plain):
            begin(local, settings)
        held = outputs(pinned, VersionChoice())
        pinned.router.pin("a")
        train(pinned, 2)
        if not settings.staleness:  # when updates are made beside forwards, which is which run's is a matter of time
            train(plain, 2)
            assert torch.equal(pinned.router.serving.logits(IDS), plain.router.serving.logits(IDS))
        assert same(outputs(pinned, V2), held)


def test_memory_is_one_copy_of_the_weights_and_is_given_back() -> None:
    with cluster(SOURCE, 2) as local:
        begin(local)

        def pinned_bytes() -> list[int]:
            return [host.status()["pinned_bytes"] for host in local.hosts]

        def weight_bytes() -> list[int]:
            return [
                sum(t.nbytes for stack in host.holdings.stacks for t in stack.weights.values()) for host in local.hosts
            ]

        local.router.pin("a")
        assert pinned_bytes() == [0, 0], "nothing was written since"
        local.router.pin("b")
        train(local, 1)
        assert pinned_bytes() == weight_bytes(), "both keep the same tensors"
        train(local, 2)
        assert pinned_bytes() == weight_bytes()
        local.router.pin("c")
        train(local, 1)
        assert pinned_bytes() == [2 * size for size in weight_bytes()]
        trunk_bytes = local.router.vitals()["pinned_bytes"]
        local.router.keep_pins(["a"])
        assert [pinned.name for pinned in local.router.vitals()["pins"]] == ["a"]
        assert pinned_bytes() == weight_bytes()
        assert local.router.vitals()["pinned_bytes"] == trunk_bytes // 3
        local.router.keep_pins([])
        train(local, 1)
        assert pinned_bytes() == [0, 0]
        assert local.router.vitals()["pinned_bytes"] == 0
        addresses = [stack.weight(stack.names[0]).data_ptr() for host in local.hosts for stack in host.holdings.stacks]
        train(local, 1)
        again = [stack.weight(stack.names[0]).data_ptr() for host in local.hosts for stack in host.holdings.stacks]
        assert again == addresses, "updates are made in place again"


def test_a_version_that_is_gone_is_refused_and_says_which_are_there() -> None:
    with cluster(SOURCE, 2) as local:
        begin(local)
        local.router.pin("prod")
        stream = local.router.serving.generate(PROMPT, Sampling(max_tokens=6), timeout_s=20, choice=V2)
        next(stream)
        train(local, 1)
        for choice, wanted in ((VersionChoice(pinned=1), "version 1"), (VersionChoice(pin="test"), "pin test")):
            with pytest.raises(VersionGone, match=rf"{wanted} is not kept; there are version 2 \(pin prod\), .*3"):
                local.router.serving.score(PROMPT, choice)
        local.router.keep_pins([])
        with pytest.raises(VersionGone, match="there are the newest, 3"):
            local.router.serving.score(PROMPT, V2)
        with pytest.raises(VersionGone, match="given up"):
            next(stream)


def test_what_is_forgotten_is_the_pin_that_was_meant() -> None:
    """The message may come late, when another pin has the name."""
    with cluster(SOURCE, 2) as local:
        begin(local)
        first = local.router.pin("prod")
        local.router.keep_pins([])
        train(local, 1)
        second = local.router.pin("prod", ttl_s=60.0)
        assert second.expires_s == second.created_s + 60.0
        pins = local.router.serving.pins
        pins.forget("prod", first.created_s)
        assert local.router.serving.score(PROMPT, VersionChoice(pin="prod"))[1] == 3
        pins.forget("prod", second.created_s)
        pins.forget("prod", second.created_s)
        with pytest.raises(VersionGone):
            local.router.serving.score(PROMPT, VersionChoice(pin="prod"))


def test_who_gives_a_pin_up_waits_for_no_frozen_actor() -> None:
    with cluster(SOURCE, 2, links="socket") as local:
        begin(local)
        local.router.pin("prod")
        local.router.serving.score(PROMPT, V2)
        failures: list[BaseException] = []

        def ask() -> None:
            try:
                local.router.serving.score(PROMPT, V2)
            except VersionGone as error:
                failures.append(error)

        member = local.members["expert-0"]
        member.freeze()
        try:
            asker = threading.Thread(target=ask)
            asker.start()
            time.sleep(0.2)
            started = time.monotonic()
            local.router.serving.pins.keep([])
            asker.join(20.0)
            assert len(failures) == 1
            assert time.monotonic() - started < local.timeout_s / 2
        finally:
            member.thaw()


def test_an_expert_cache_keeps_no_version() -> None:
    with cluster(SOURCE, 2, cache=CacheSettings(2)) as local:
        begin(local)
        with pytest.raises(InvalidInput, match="expert_cache_size"):
            local.router.pin("prod")
        with pytest.raises(VersionGone):
            local.router.serving.score(PROMPT, V2)
        train(local, 1)


def moved(local: LocalCluster) -> None:
    """All groups in the other's place, and back where they were."""
    groups = [held[0][-1] for held in local.placement.holders]
    local.adopt(*("1" if number == "0" else "0" for number in groups))
    train(local, 1)
    local.adopt(*groups)


def grown(local: LocalCluster) -> None:
    local.grow(Growth(2 * local.placement.num_experts))


def saved(snapshot: Snapshot[Key]) -> SavedState[Key]:
    def read(keys: Sequence[Key]) -> list[Tensor]:
        return [snapshot.tensors[key] for key in keys]

    return SavedState(snapshot.version, snapshot.updates, snapshot.optimizer, frozenset(snapshot.tensors), read)


def restored(local: LocalCluster) -> None:
    taken = local.router.take_snapshot()
    states = {host.name: host.saving.snapshot for host in local.hosts}
    router = local.router.saving.snapshot
    train(local, 2)
    for host in local.hosts:
        state = states[host.name]
        assert state is not None
        host.saving.restore(local.placement.held_by(host.name), saved(state), taken.run + 1)
    assert router is not None
    local.router.restore(local.roster(local.placement), saved(router), taken.run + 1)


@pytest.mark.parametrize("happens", [moved, grown, restored])
def test_what_is_pinned_outlives_changes(happens: Callable[[LocalCluster], None]) -> None:
    with cluster(SOURCE, 2, links="socket") as local:
        begin(local)
        local.router.pin("prod")
        before = outputs(local, V2)
        train(local, 1)
        happens(local)
        train(local, 1)
        assert same(outputs(local, V2), before)


def test_a_copy_answers_for_a_dead_actor() -> None:
    with cluster(SOURCE, 3, redundancy=2, links="socket", heals=True) as local:
        begin(local)
        local.router.pin("prod")
        before = outputs(local, V2)
        train(local, 1)
        local.members["expert-0"].kill()
        after = outputs(local, V2)
        assert after[3] == before[3]
        torch.testing.assert_close(after[0], before[0])
        train(local, 1)
        assert same(outputs(local, V2), after)


def test_without_copies_the_death_of_an_actor_is_the_end_of_its_pins() -> None:
    with cluster(SOURCE, 2, links="socket") as local:
        begin(local)
        local.router.pin("prod")
        local.members["expert-0"].kill()
        with pytest.raises(StepAborted, match="no expert actor holds"):
            local.router.serving.logits(IDS, V2)


def test_every_router_has_it_also_one_that_joins_later_and_one_that_takes_over() -> None:
    with cluster(SOURCE, 2, links="socket", piece_bytes=PIECE_BYTES) as local:
        group = Routers(local)
        try:
            group.add()
            begin(local)
            local.router.pin("prod")
            before = outputs(local, V2)
            train(local, 1)
            group.add()
            train(local, 1)
            for router in group.living.values():
                assert torch.equal(router.serving.logits(IDS, V2), before[0])
            group.seats["router-0"].kill()
            group.promote("router-1")
            train(local, 1)
            for router in group.living.values():
                assert torch.equal(router.serving.logits(IDS, V2), before[0])
            local.router.keep_pins([])
            for router in group.living.values():
                with pytest.raises(VersionGone):
                    router.serving.logits(IDS, V2)
        finally:
            group.close()


def test_at_most_so_many_updates_behind() -> None:
    """Updates stay pending until a forward wants them."""
    with cluster(SOURCE, 2) as local:
        local.router.begin_run(OptimizerSettings(staleness=3))
        for host in local.hosts:
            host.updates.brake.sleep_s = 0.3
        train(local, 3)
        _, used = local.router.serving.score(PROMPT, VersionChoice(max_behind=3))
        assert 0 <= used <= 3
        _, used = local.router.serving.score(PROMPT)
        assert used == 3, "the newest that is committed"
        assert replace(VersionChoice(), max_behind=1).is_newest
