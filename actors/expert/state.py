"""What an expert actor is at a moment: version, run, what it holds, the step under way, and who is concerned by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from actors.errors import InvalidInput, StepAborted
from actors.expert.arrivals import Arrivals
from actors.expert.copies import Copies
from actors.expert.exchange import Exchange
from actors.expert.followers import Followers
from actors.expert.holdings import Holdings
from actors.expert.loader import HoldingsLoader
from actors.expert.pins import KeptVersions
from actors.expert.transaction import Transaction
from actors.expert.updates import Updates
from actors.fairlock import FairLock
from actors.moe.experts import Weights


class State:
    """What the parts of an `ExpertHost` share: each of them changes it by what it is asked, with `lock` held."""

    def __init__(
        self, name: str, loader: HoldingsLoader, groups: Sequence[int], exchange: Exchange, *, version: int = 0
    ) -> None:
        self.name = name
        self.loader = loader
        loader.is_own = self.is_own
        self.quarters = loader.quarters
        self.lock = FairLock()
        """Held around every question and every control call. Fair, or a question would wait for all of a group that
        arrives, and not for the piece of it at hand."""
        self.version = version
        self.run = 0
        """Number of the job whose moments these are."""
        self.num_experts = self.quarters.layout.num_experts
        """Of every layer now: the model may have grown."""
        self.check_groups(groups)
        self.holdings = loader.load(groups)
        self.step = Transaction(version)
        self.exchange = exchange
        self.copies = Copies(exchange, self.group_size)
        self.followers = Followers(exchange)
        self.arrivals = Arrivals(exchange, self.drained)
        self.kept = KeptVersions()
        self.updates = Updates(name, lambda: self.holdings, self.quarters.device, timeout_s=exchange.timeout_s)
        self.updates.on_made = self.measure
        self.memory_bytes = self.holdings.num_bytes()
        self.pinned_bytes = 0

    @property
    def groups(self) -> tuple[int, ...]:
        return self.holdings.groups

    @property
    def group_size(self) -> int:
        return self.quarters.group_size

    @property
    def owned(self) -> list[int]:
        """Groups that are held here and copied elsewhere, if anywhere."""
        return self.copies.owned(self.groups)

    def is_own(self, group: int) -> bool:
        """Whether nobody else has to update it alike. What arrives or leaves is somebody else's too."""
        is_alone = group in self.groups and bool(self.copies.alone([group]))
        return is_alone and group not in self.followers.groups

    @property
    def staleness(self) -> int:
        return self.holdings.settings.staleness

    def close(self) -> None:
        """Ends its links to other actors."""
        self.updates.close()
        self.exchange.close()
        self.followers.close()
        self.holdings.close()

    def at_rest(self) -> list[Weights] | None:
        """Of every layer, where they are all on this device and are updated in place, by commits alone."""
        settings = self.holdings.settings
        if self.quarters.cache is not None or settings.staleness or settings.sparse == "exact":
            return None
        return [stack.weights for stack in self.holdings.stacks]

    # -- changes ------------------------------------------------------------------------------------------------------

    def drained(self) -> Holdings:
        """With every committed update in them."""
        self.updates.drain()
        return self.holdings

    def new_run(self, run: int) -> None:
        """Other moments than before: groups on their way here have the old ones and are dropped."""
        self.run = run
        self.followers.clear()
        self.copies.forget()
        for group in self.holdings.arriving:
            self.arrivals.drop(group)

    def enter(self, fields: Mapping[str, Any]) -> None:
        """A message of a step; with the first one of an attempt those before are void."""
        if self.step.begins(fields, self.version):
            self.drop_gradients()

    def drop_gradients(self) -> None:
        self.holdings.drop_gradients()
        self.copies.drop()
        self.end_attempt()

    def end_attempt(self) -> None:
        self.step.clear()
        self.exchange.forget_gradients(self.step.attempt)

    def measure(self) -> None:
        """After a change of what takes memory. From any thread."""
        self.memory_bytes = self.holdings.num_bytes() + self.copies.num_bytes()
        self.pinned_bytes = self.kept.num_bytes(self.holdings)

    # -- checks -------------------------------------------------------------------------------------------------------

    def check_version(self, wanted: int) -> None:
        """`StepAborted` for one that is still to come."""
        if wanted > self.version:
            raise StepAborted(f"version {wanted} is asked for, {self.version} is here")

    def check_groups(self, groups: Sequence[int]) -> None:
        num_groups = self.num_experts // self.group_size
        for group in groups:
            if not 0 <= group < num_groups:
                raise InvalidInput(
                    f"the model has {self.num_experts} experts a layer",
                    field="groups",
                    value=group,
                    remedy=f"with groups of {self.group_size} the last group is {num_groups - 1}",
                )

    def layer_of(self, fields: Mapping[str, Any]) -> int:
        """The layer that a message is about, checked."""
        layer, num_layers = fields.get("layer"), len(self.holdings.stacks)
        if type(layer) is not int or not 0 <= layer < num_layers:
            raise InvalidInput(f"must be 0 to {num_layers - 1}", field="layer", value=layer)
        return layer
