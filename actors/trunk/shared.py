"""Shared experts of a layer, computed while its routed tokens are away.

Most families add them after the routed ones, from the same tensor: `experts(x) + shared_experts(x)`. Their code stays
as it is. A layer that is seen to do so, in a trial before it is used, has its shared experts computed inside the call
of the routed ones, and its own call gets the result that is there. It is the same function of the same tensor, so no
number changes.

Families that call their shared experts before the routed ones (Qwen-MoE) have nothing left to compute then, and those
that give them something else or more than that tensor are left alone.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

Meanwhile = Callable[[], None]
"""Something to do while tokens are away."""

NAMES = ("shared_experts", "shared_expert")
"""Beside the experts module, in the families."""


def nothing() -> None:
    """The `Meanwhile` of who has nothing to do."""


@dataclass
class _Visit:
    """One call of the MoE block."""

    given: Tensor | None
    """To the block."""
    sent: Tensor | None = None
    """To the routed experts."""
    early: Tensor | None = None
    """Output of the shared experts, for `input` as it was at `version`."""
    input: Tensor | None = None
    version: int = 0


class SharedExperts:
    """Of one MoE block. Any number of threads may be in the block, each in a visit of its own."""

    def __init__(self, block: nn.Module, shared: nn.Module) -> None:
        self._compute: Callable[..., Any] = shared.forward
        self._here = threading.local()
        self._source: Literal["", "given", "sent"] = ""
        """Which tensor of a visit the family gives to its shared experts; empty: not known."""
        self._is_tried = False
        """Now. Later on nothing is learnt: activation checkpointing runs a forward again, and must find the same
        order."""
        self._block = block
        block.register_forward_pre_hook(self._enter, with_kwargs=True)
        block.register_forward_hook(self._leave, always_call=True)
        shared.__dict__["forward"] = self._called

    @property
    def is_early(self) -> bool:
        """Whether they are computed while tokens are away."""
        return bool(self._source)

    def try_out(self, x_BSD: Tensor) -> None:
        """Sees what the block does. Its routed experts must be computed by something."""
        self._is_tried = True
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                self._block(x_BSD)
        except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
            # It wants more than one tensor, say: then nothing is done early.
            logger.info("shared experts of %s are not computed early: %s", type(self._block).__name__, error)
            self._source = ""
        finally:
            self._is_tried = False

    def sending(self, x_TD: Tensor) -> Meanwhile:
        """The block's routed experts are called with these tokens. -> what to do while they are away."""
        if (visit := self._visit) is not None:
            visit.sent = x_TD
        return self._compute_early if self._source else nothing

    def _compute_early(self) -> None:
        visit = self._visit
        x = None if visit is None else visit.given if self._source == "given" else visit.sent
        if visit is None or x is None:
            return
        visit.early, visit.input, visit.version = self._compute(x), x, _version(x)

    def _called(self, *args: Any, **kwargs: Any) -> Any:
        """In the place of the shared experts' own forward."""
        visit = self._visit
        if visit is None:
            return self._compute(*args, **kwargs)
        early, x = visit.early, args[0] if len(args) == 1 and not kwargs else None
        visit.early = None
        if early is not None:
            if x is visit.input and isinstance(x, Tensor) and _version(x) == visit.version:
                return early
            logger.warning("shared experts are no longer computed early: they were given another tensor")
            self._source = ""
        elif self._is_tried and visit.sent is not None and x is not None:
            self._source = "given" if x is visit.given else "sent" if x is visit.sent else ""
        return self._compute(*args, **kwargs)

    @property
    def _visit(self) -> _Visit | None:
        visit: _Visit | None = getattr(self._here, "visit", None)
        return visit

    def _enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else next(iter(kwargs.values()), None)
        self._here.visit = _Visit(given if isinstance(given, Tensor) else None)

    def _leave(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._here.visit = None


def watch(model: nn.Module, experts_name: str, x_BSD: Tensor) -> None:
    """Lets the shared experts beside this experts module be computed early, where the family has any. Once a module.

    `x_BSD`: any tokens, to try it out with.
    """
    experts = model.get_submodule(experts_name)
    block = model.get_submodule(experts_name.rpartition(".")[0])
    shared = next((m for name in NAMES if isinstance(m := getattr(block, name, None), nn.Module)), None)
    if shared is not None and shared_of(experts) is None:
        found = experts.__dict__["shared"] = SharedExperts(block, shared)
        found.try_out(x_BSD)


def shared_of(experts: nn.Module) -> SharedExperts | None:
    """What `watch` found."""
    found: SharedExperts | None = experts.__dict__.get("shared")
    return found


def _version(x: Tensor) -> int:
    """Counts the changes in place."""
    return 0 if x.is_inference() else x._version
