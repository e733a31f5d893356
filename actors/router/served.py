"""What forwards of requests run on."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from actors.moe.gating import GatePast
from actors.router.versions import Hold

Guard = Callable[[int, Sequence[GatePast] | None], AbstractContextManager[Callable[[], int]]]
"""Entered for every forward, with its number of tokens a sequence and what the gates keep of the sessions; gives what
tells, after the forward, the version that was computed with."""


@dataclass(frozen=True)
class Served:
    """The newest version or a pinned one."""

    model: Callable[[], PreTrainedModel]
    """The view, asked for inside `guard`: a growth puts another in its place. Sessions go on then: their caches are
    those of layers that are the same."""
    guard: Guard
    new_pasts: Callable[[], Sequence[GatePast] | None] = lambda: None
    """For one session."""
    hold: Callable[[], Hold] = Hold
    """Begins what is one version over several forwards. Asked for outside of `guard`."""
    is_awaited: Callable[[], bool] = lambda: False
    """Whether somebody waits for a guard to be left."""
    key: Hashable = field(default_factory=object)
    """Sessions of equal keys may share a forward."""
    is_lasting: bool = False
    """Whether it stays when nobody asks for it: what was made ready for its sessions is kept for a while."""
