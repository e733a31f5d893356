"""A router's state on its way out and in: snapshots and restoring, to replicas, to and from model directories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from actors.compress.settings import CompressionSettings
from actors.errors import MoeClusterError, StepAborted
from actors.moe.settings import BalanceSettings
from actors.optim import OptimizerSettings
from actors.router.links import Links
from actors.router.placing import Placing, numbers
from actors.router.roster import Roster
from actors.router.state import State
from actors.snapshots import SavedState, Snapshot, to_host
from actors.trunk.checkpoint import CheckpointReader
from actors.trunk.export import export_model
from actors.values import SnapshotTaken

FILES_FACTOR = 10.0
"""A model's files may take so many times as long as one message to an expert actor."""


class Saving:
    """One thread at a time."""

    def __init__(self, state: State, placing: Placing) -> None:
        self._state, self._placing = state, placing
        self.snapshot: Snapshot[str] | None = None
        """The last one that was taken, until somebody takes it from here to write it."""
        self.for_peers: Snapshot[str] | None = None
        """The same, of one that is to be kept in memory: until it is on its way."""

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def take_snapshot(self, *, for_peers: bool = False) -> SnapshotTaken:
        """See `Router.take_snapshot`. Every expert actor is there."""
        if for_peers:  # its memory first
            self.for_peers = None
        else:
            self.snapshot = None
        state = self._state
        owners = self._snapshots_of_experts(for_peers)
        tensors = {**state.learner.state(), **state.learner.moments()}
        copies = {name: to_host(tensor) for name, tensor in tensors.items()}
        snapshot = Snapshot(state.version, state.run, 0, state.learner.settings, copies)
        if for_peers:
            self.for_peers = snapshot
        else:
            self.snapshot = snapshot
        return SnapshotTaken(state.version, state.run, owners, self._placing.roster.placement.num_experts)

    def _snapshots_of_experts(self, for_peers: bool) -> tuple[str, ...]:
        """-> the actors that made one, each of the groups that it owns."""
        fields = {"version": self._state.version, "run": self._state.run, "for_peers": for_peers}
        answers = self._state.training.links.ask_all("snapshot", fields)
        owned = {name: groups for name, answer in answers.items() if (groups := numbers(answer, "groups"))}
        num_groups = self._placing.roster.placement.num_groups
        if sorted(group for groups in owned.values() for group in groups) != list(range(num_groups)):
            raise StepAborted(f"not every expert group has one owner: {owned}")
        return tuple(owned)

    def restore(self, roster: Roster, saved: SavedState[str], run: int) -> None:
        """Here and at the expert actors; see `Router.restore`."""
        state = self._state
        found = dict(zip(saved.keys, saved.read(list(saved.keys)), strict=True))
        state.learner.drop_gradients()
        self.snapshot = None
        with state.serving.stopped():
            state.disconnect()
            state.learner.take(found, saved.optimizer, roster.placement.num_experts)
            state.attempt += 1
            state.version, state.run = saved.version, run
            state.training.links.connect(roster.peers)
            self._placing.place(roster)
            state.serving.open()

    # -- replicas -----------------------------------------------------------------------------------------------------

    def give(self, names: Sequence[str]) -> None:
        """All that this router is, to these replicas."""
        if not names:
            return
        state, learner = self._state, self._state.learner
        tensors = {name: to_host(tensor) for name, tensor in learner.state().items()} | learner.moments()
        ticket = {
            **self._placing.fields(),
            **learner.rules(),
            "version": state.version,
            "run": state.run,
            "num_experts": learner.skeleton.num_experts,
            "shut": state.serving.is_shut,
            "optimizer": learner.settings.to_dict(),
        }
        state.replicas.give_state(names, {name: tensor.contiguous() for name, tensor in tensors.items()}, ticket)

    def take(self, tensors: Mapping[str, Tensor], ticket: Mapping[str, Any]) -> None:
        """Counterpart of `give`, but for the placement; `Placing.follow` comes next. Serving waits already."""
        state, learner = self._state, self._state.learner
        version, run, num_experts = (int(ticket[key]) for key in ("version", "run", "num_experts"))
        learner.drop_gradients()
        state.disconnect()
        learner.take(tensors, OptimizerSettings(**ticket["optimizer"]), num_experts)
        learner.follow_rules(*rules_of(ticket))
        state.version, state.run = version, run
        if ticket["shut"]:
            state.serving.shut()
        else:
            state.serving.open()

    # -- model directories --------------------------------------------------------------------------------------------

    def load(self, path: str, reader: CheckpointReader) -> None:
        """Trunk and experts; see `Router.replace_weights`."""
        state = self._state
        with state.serving.stopped():
            was_shut = state.serving.is_shut
            state.replicas.shut(True)
            state.serving.shut()
            state.run += 1
            fields = {"path": path, "run": state.run}
            try:
                state.training.links.ask_all("load", fields, timeout_s=FILES_FACTOR * state.timeout_s)
            except MoeClusterError:
                if not was_shut and self._is_untouched():
                    state.run -= 1
                    state.replicas.shut(False)
                    state.serving.open()
                raise
            state.learner.load(path, reader)
            state.serving.open()

    def _is_untouched(self) -> bool:
        """Whether no expert actor has begun this run. It says so after all that it was asked before."""
        state = self._state
        try:
            told = state.training.links.ask_all("status", {}, timeout_s=FILES_FACTOR * state.timeout_s)
        except MoeClusterError:
            return False
        return all(answer.fields["run"] != state.run for answer in told.values())

    def export(self, directory: Path, links: Links) -> list[str]:
        """See `Router.export`. Nobody else asks over these links meanwhile."""
        learner = self._state.learner
        return export_model(
            directory,
            learner.trunk,
            learner.skeleton,
            links,
            learner.routing.save,
            tokenizer_from=learner.source.path,
            timeout_s=FILES_FACTOR * self._state.timeout_s,
        )


def rules_of(fields: Mapping[str, Any]) -> tuple[BalanceSettings, CompressionSettings]:
    """Counterpart of `Learner.rules`."""
    return BalanceSettings(**fields["balance"]), CompressionSettings(**fields["compression"])
