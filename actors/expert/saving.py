"""The state of an expert actor on its way out and in: snapshots, exports, imports, and versions that are pinned."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from actors.errors import InvalidInput, StepAborted
from actors.expert.exchange import Attempt
from actors.expert.holdings import Holdings
from actors.expert.state import State
from actors.snapshots import ExpertKey, SavedState, Snapshot
from actors.transport.message import Message
from actors.values import Placement


class Saving:
    """Called with the host's lock held, but for `restore`. Only groups that are owned here are saved: copies are their
    owners' business."""

    def __init__(self, state: State) -> None:
        self._state = state
        self.snapshot: Snapshot[ExpertKey] | None = None
        """The last one that was asked for, until somebody takes it from here to write it."""
        self.for_peers: Snapshot[ExpertKey] | None = None
        """The same, of one that is to be kept in memory."""

    # -- out ----------------------------------------------------------------------------------------------------------

    def take_snapshot(self, question: Message) -> Message:
        fields: Any = question.fields
        state, version = self._state, int(fields["version"])
        if version != state.version:
            raise StepAborted(f"a snapshot of version {version} is asked for, {state.version} is here")
        owned, run = state.owned, int(fields["run"])
        if fields.get("for_peers"):
            self.for_peers = None  # its memory first
            self.for_peers = state.drained().snapshot(owned, version, run)
        else:
            self.snapshot = None
            self.snapshot = state.drained().snapshot(owned, version, run)
        return Message("ok", {"groups": owned, "version": version})

    def export_layer(self, question: Message) -> Message:
        """Stacked weights of one layer's experts; `experts` are their numbers, in that order."""
        state = self._state
        layer, owned = state.layer_of(question.fields), state.owned
        parts = [state.drained().read(group, layer)[0][::3] for group in owned]
        tensors = tuple(torch.cat(kind) for kind in zip(*parts, strict=True))
        names = list(state.holdings.stacks[layer].names) if owned else []
        fields = {"names": names, "experts": state.holdings.experts_of(owned), "version": state.version}
        return Message("ok", fields, tensors)

    # -- in -----------------------------------------------------------------------------------------------------------

    def load_model(self, question: Message) -> Message:
        """Replaces all weights by those of another directory of the same architecture; moments start anew."""
        fields: Any = question.fields
        state = self._state
        holdings = state.loader.load(state.groups, str(fields["path"]))
        _check_alike(state.holdings, holdings)
        holdings.begin_run(state.holdings.settings)
        state.new_run(int(fields.get("run", state.run + 1)))
        state.drop_gradients()
        state.updates.drop()
        state.holdings.close()
        state.holdings = holdings
        return Message("ok", {"version": state.version})

    def restore(self, groups: Sequence[int], saved: SavedState[ExpertKey], run: int) -> None:
        """From now on exactly these groups are here, as they were saved; all that was here is gone.

        Called from a thread of its own. Until the next `place` every question that needs experts is refused. After an
        error nothing is here, and it can be called again.
        """
        state = self._state
        state.num_experts = max((key.expert + 1 for key in saved.keys), default=state.num_experts)
        state.check_groups(groups)
        state.loader.check_settings(saved.optimizer)
        with state.lock:
            self._clear(run)
        holdings = state.loader.blank(groups)
        holdings.load(saved)
        with state.lock:
            state.holdings.close()
            state.holdings = holdings
            state.version, state.step.attempt = saved.version, Attempt(saved.version, 0)
            state.measure()

    def _clear(self, run: int) -> None:
        """Before what is saved is read, so that there is memory for it."""
        state = self._state
        state.updates.drop()
        state.new_run(run)
        state.drop_gradients()
        state.exchange.forget_gradients(Attempt(sys.maxsize, 0))  # steps with these numbers will come again
        state.copies.use(Placement(0, (), state.group_size))
        self.snapshot = None
        state.holdings.close()
        state.holdings = state.loader.blank(())
        state.measure()

    # -- kept beside the newest ---------------------------------------------------------------------------------------

    def pin(self, question: Message) -> Message:
        """Keeps the version that is asked for, which is the newest, under a name."""
        fields: Any = question.fields
        state, version = self._state, int(fields["version"])
        if state.quarters.cache is not None:
            raise InvalidInput(
                "a version is kept by references to its weights, and experts.expert_cache_size is set, where all are "
                "written in place",
                field="pin",
                remedy="set experts.expert_cache_size to 0",
            )
        if version != state.version:
            raise StepAborted(f"version {version} is to be pinned, {state.version} is here")
        kept = state.kept.add(str(fields["name"]), state.drained(), version)
        state.measure()
        return Message("ok", {"experts": list(kept.experts), "version": version})

    def keep_pins(self, question: Message) -> Message:
        """These and no others."""
        fields: Any = question.fields
        state = self._state
        state.kept.keep({str(name) for name in fields["names"]}, state.drained())
        state.measure()
        return Message("ok", {"names": state.kept.names})


def _check_alike(mine: Holdings, loaded: Holdings) -> None:
    for own, other in zip(mine.stacks, loaded.stacks, strict=True):
        for name in other.names:
            if own.shape(name) != other.shape(name):
                raise InvalidInput("another architecture", field=name, value=other.shape(name))
