"""Plain values that cross process borders. No torch here: who only passes them on need not import it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

MAX_IN_FLIGHT = 8
"""Micro-batches that a router computes at once."""


@dataclass(frozen=True)
class Placement:
    """Which expert actors hold which expert group."""

    epoch: int
    """Counts placements; a message that names another epoch was routed by another placement."""
    holders: tuple[tuple[str, ...], ...]
    """Actors that hold each group: its owner first, then those with a copy. Empty: the group is lost."""
    group_size: int
    """Experts of every MoE layer in a group: group g holds experts [g * group_size, (g + 1) * group_size)."""

    @property
    def num_groups(self) -> int:
        return len(self.holders)

    @property
    def num_experts(self) -> int:
        return len(self.holders) * self.group_size

    @property
    def actors(self) -> tuple[str, ...]:
        """Every holder once, owners in the order of their first group, then those that hold copies only."""
        owners = [held[0] for held in self.holders if held]
        return tuple(dict.fromkeys([*owners, *(actor for held in self.holders for actor in held)]))

    @property
    def has_copies(self) -> bool:
        return any(len(held) > 1 for held in self.holders)

    @property
    def missing(self) -> tuple[int, ...]:
        """Groups that nobody holds."""
        return tuple(group for group, held in enumerate(self.holders) if not held)

    def owner(self, group: int) -> str:
        """Sums the gradients of all copies. Empty for a lost group."""
        return self.holders[group][0] if self.holders[group] else ""

    def owned_by(self, actor: str) -> tuple[int, ...]:
        return tuple(group for group in range(self.num_groups) if self.owner(group) == actor)

    def held_by(self, actor: str) -> tuple[int, ...]:
        """Groups it owns or has a copy of."""
        return tuple(group for group, held in enumerate(self.holders) if actor in held)

    def experts_of_group(self, group: int) -> range:
        if not 0 <= group < len(self.holders):
            raise IndexError(f"no expert group {group} of {len(self.holders)}")
        return range(group * self.group_size, (group + 1) * self.group_size)

    def without(self, actors: Collection[str]) -> Placement:
        """The next epoch after these actors died: the first copy that is left becomes the owner."""
        holders = tuple(tuple(actor for actor in held if actor not in actors) for held in self.holders)
        return replace(self, epoch=self.epoch + 1, holders=holders)


@dataclass(frozen=True)
class Growth:
    """More experts in every MoE layer of a running model."""

    num_experts: int
    """There are to be."""
    mode: str = "copy"
    """`copy`: new experts are perturbed copies of old ones; `fresh`: they are drawn as at a model's beginning."""
    perturbation: float = 0.01
    """Of copies: noise on each expert's parameters, relative to their root mean square."""
    seed: int = 0
    """Of noise, fresh weights and the gate's directions."""
    open_steps: int = 100
    """Steps within which experts that a gate's bias keeps out at first are let in."""


@dataclass(frozen=True)
class Grown:
    """What a growth has made."""

    placement: Placement
    num_parameters: int
    """Of the whole model."""
    way: str
    """How the gate took the new experts: `split` or `closed`, see `actors.moe.growth`. Empty where nobody can tell any
    more, nor what follows."""
    moved_share: float
    """Of gate weight that went to other experts, over the layers, on the tokens that were tried."""
    waited_s: float
    """Steps and requests stood still for."""


@dataclass(frozen=True)
class Address:
    """Where an expert actor listens. `host_id` tells whether ipc reaches it."""

    host_id: str
    ipc: str
    tcp: str


@dataclass(frozen=True)
class Sampling:
    max_tokens: int = 128
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Smallest set of tokens whose probability reaches this (Holtzman et al. 2020)."""
    seed: int = 0


@dataclass(frozen=True)
class VersionChoice:
    """Which version a request is computed with; as it is, the newest that is committed."""

    pin: str = ""
    """Name of a pin."""
    pinned: int | None = None
    """A version that a pin keeps."""
    max_behind: int = 0
    """Of the newest: updates that experts may still have to make. Asynchronous jobs leave some for a while."""

    @property
    def is_newest(self) -> bool:
        return not self.pin and self.pinned is None


NEWEST = VersionChoice()


@dataclass(frozen=True)
class Pinned:
    """What a pin has kept, and where."""

    name: str
    version: int
    held: Mapping[str, tuple[int, ...]]
    """Expert actor -> experts of it whose weights it keeps."""
    num_experts: int
    """Of every MoE layer then."""
    created_s: float = 0.0
    """Unix time, as is the end."""
    expires_s: float | None = None
    """When whoever looks after the cluster is to give it up; None: never."""

    def is_whole(self, actors: Collection[str]) -> bool:
        """Whether these actors together have every expert."""
        return len({e for actor in actors for e in self.held.get(actor, ())}) == self.num_experts


@dataclass(frozen=True)
class TokenEvent:
    token: int
    version: int
    """Expert version it was computed with."""
    finish_reason: str = ""
    """`length` or `end_of_text` with the last token."""


@dataclass(frozen=True)
class StepReport:
    """What a committed step did. `loss` in nats a token, before the update."""

    step: int
    loss: float
    grad_norm: float
    """Global norm over trunk and experts, before clipping."""
    num_tokens: int
    """Predicted tokens, over all micro-batches."""
    seconds: float
    retries: int
    load_LE: list[list[int]] = field(repr=False)
    """Pairs that each expert of each MoE layer got."""
    balance_loss: float = 0.0
    """Mean over the micro-batches, coefficients included."""
    staleness_mean: float = 0.0
    """Committed updates that were not in the experts it was computed on, the mean over these experts."""
    staleness_max: int = 0
    merged_updates: int = 0
    """Of expert actors, since the step before: committed updates that were made as part of others."""


@dataclass(frozen=True)
class Promotion:
    """A router leads now in the place of one that died."""

    version: int
    report: StepReport | None
    """Of the step that led to this version, where this router has taken part in it."""
    placement: Placement
    """That it goes on with. The one that died may have changed the number of experts and not said so."""
    num_parameters: int
    """Of the whole model."""


@dataclass(frozen=True)
class Course:
    """What the steps of one job are counted from."""

    run: int
    """Counts jobs, and returns to checkpoints: moments belong to one run."""
    version: int
    """At its begin, or where it goes on."""


@dataclass(frozen=True)
class SnapshotTaken:
    version: int
    run: int
    actors: tuple[str, ...]
    """Expert actors that have a part of it, beside the router."""
    num_experts: int = 0
    """Of every MoE layer then."""
