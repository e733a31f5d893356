"""Whether the cluster is ready and whole, what it lacks, and whether that can come back; in words too."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.control.fleet import Fleet
from cluster.control.rebalancing import named


class Health:
    def __init__(self, fleet: Fleet, redundancy: int) -> None:
        self._fleet, self._redundancy = fleet, redundancy
        self.routers_wanted = 1
        """With fewer the cluster is not whole."""
        self.can_restore = False
        """Whether there is a checkpoint that what is lost can come back from."""
        self.is_pristine = True
        """The weights are still those of the model directory: no step and no import since."""
        self.mixed = ""
        """Why weights are of two models; empty if they are not."""
        self.notice = ""
        """What status is to say beside what is known here."""
        self.unsaved = ""
        """Why a change of the model, or a job's end, is in no checkpoint yet; empty if it is."""

    @property
    def is_ready(self) -> bool:
        """Everything that a step needs is there once, and belongs together."""
        return self._fleet.members.has_ready("router") and not self._fleet.groups_below(1) and not self.mixed

    @property
    def is_whole(self) -> bool:
        """Ready, with as many copies and routers as there are to be."""
        has_routers = self._fleet.members.count_ready("router") >= self.routers_wanted
        return self.is_ready and has_routers and not self._fleet.scarce_groups(self._redundancy)

    @property
    def is_router_lost(self) -> bool:
        return self._fleet.members.has_died("router")

    @property
    def can_return(self) -> bool:
        """Expert groups are lost that no living actor has, or the trunk, or weights do not belong together, and all can
        be loaded again."""
        if self._fleet.placement.missing or self.mixed:
            return self.can_restore
        return self.is_router_lost and (self.can_restore or self.is_pristine)

    def missing_of(self, groups: Sequence[int]) -> list[int]:
        """Those of them that no actor holds any more."""
        return [group for group in groups if group in self._fleet.placement.missing]

    def after_loss(self, role: str, groups: Sequence[int]) -> str:
        """What becomes of what an actor had, as the end of a sentence. `groups`: those that it held, if it is dead."""
        gone = self.missing_of(groups)
        if gone and self.can_restore:
            return f"; no actor holds {named(gone)} any more, the last checkpoint brings them back"
        if role == "router" and self._fleet.members.has_ready("router"):
            return "; the other routers go on"
        if groups and not gone:
            return f"; copies took over {named(groups)}"
        if role == "router" and not groups and self.can_restore:
            return "; the last checkpoint brings it back"
        return ""

    def message(self) -> str:
        """For status; empty if all is well."""
        missing = self._fleet.placement.missing
        if missing and self.can_restore:
            return f"restoring {named(missing)} from the last checkpoint" + (f": {self.notice}" if self.notice else "")
        if missing:
            return f"no actor holds {named(missing)} any more"
        if silent := self._fleet.groups_below(1):
            return f"expert groups without a ready holder: {', '.join(map(str, silent))}"
        if not self._fleet.members.has_ready("router"):
            return self._message_without_router()
        if self.mixed:
            remedy = "restoring the last checkpoint" if self.can_restore else "import it again"
            return f"{self.mixed}: weights are of two models; {remedy}" + (f": {self.notice}" if self.notice else "")
        return "; ".join(part for part in (self._degraded(), self.notice, self.unsaved) if part)

    def _degraded(self) -> str:
        lacks = []
        if scarce := self._fleet.scarce_groups(self._redundancy):
            have = "has" if len(scarce) == 1 else "have"
            lacks.append(f"{named(scarce)} {have} fewer than {self._redundancy} holders")
        if (count := self._fleet.members.count_ready("router")) < self.routers_wanted:
            lacks.append(f"{count} of {self.routers_wanted} routers are ready")
        return f"degraded: {', '.join(lacks)}" if lacks else ""

    def _message_without_router(self) -> str:
        if not self.is_router_lost:
            return "no router is ready"
        if self.can_return:
            return "the router died; bringing it back" + (f": {self.notice}" if self.notice else "")
        return "the router died with weights that are in no checkpoint; set checkpoint.every_steps, and start again"
