"""Versions that a router keeps beside the newest: a copy of trunk and gates, and links of its own to the experts.

Expert actors keep their part by the placement of the time (`actors.expert.pins`). So a pinned version is computed as it
was then, wherever groups have gone since, and its forwards wait for no commit.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from actors.errors import LinkError, StepAborted, VersionGone
from actors.fairlock import FairLock
from actors.moe.fp8 import Payload
from actors.moe.gating import GatePast
from actors.router.dispatcher import Dispatcher
from actors.router.learner import Learner
from actors.router.passes import Purpose
from actors.router.roster import Peer
from actors.router.served import Served
from actors.trunk.model import connect
from actors.values import Pinned, VersionChoice

logger = logging.getLogger(__name__)


class PinnedModel:
    """One version, called by any number of threads; one forward at a time."""

    def __init__(
        self,
        pinned: Pinned,
        learner: Learner,
        tensors: Mapping[str, Tensor],
        peers: Mapping[str, Peer],
        *,
        timeout_s: float,
        payload: Payload = "trunk",
    ) -> None:
        """`tensors`: what `Learner.copied` gave at that version. `peers`: the actors of `pinned.held`."""
        self.pinned, self.peers, self.tensors = pinned, dict(peers), dict(tensors)
        self._view, routing = learner.view_of(tensors, pinned.num_experts)
        num_layers = len(learner.skeleton.layers)
        self._dispatcher = Dispatcher(
            num_layers, pinned.num_experts, timeout_s=timeout_s, reroutes=True, payload=payload
        )
        connect(self._view, [routing.layer_function(i, self._dispatcher) for i in range(num_layers)])
        self._lock = FairLock()
        self._is_gone = self._is_linked = False
        self.served = Served(lambda: self._view, self.reading, routing.new_pasts)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @contextmanager
    def reading(self, sequence_length: int = 1, pasts: Sequence[GatePast] | None = None) -> Iterator[Callable[[], int]]:
        """One forward. `VersionGone` once it is given up; `StepAborted` while nobody that lives keeps an expert."""
        version = self.pinned.version
        with self._lock:
            self._check()
            self._link()
            purpose = Purpose(min_version=version, sequence_length=sequence_length, pasts=pasts, pin=self.pinned.name)
            self._dispatcher.begin(purpose)
            try:
                yield lambda: version
                self._dispatcher.finish()
            except (StepAborted, LinkError):
                self._check()
                self._is_linked = False  # the next one looks whether those that are lost are back
                raise

    def _check(self) -> None:
        if self._is_gone:
            raise VersionGone(f"pin {self.pinned.name} of version {self.pinned.version} was given up")

    def _link(self) -> None:
        """To those that live."""
        if not self._is_linked:
            living: dict[str, Peer] = {}
            self._dispatcher.links.connect({})
            for name, peer in self.peers.items():
                try:
                    self._dispatcher.links.connect({**living, name: peer})
                    living[name] = peer
                except LinkError as error:
                    logger.info("pin %s does without %s: %s", self.pinned.name, name, error)
            self._dispatcher.links.connect(living)
            held = {name: list(experts) for name, experts in self.pinned.held.items()}
            self._dispatcher.use(0, held, self.pinned.num_experts)
            self._is_linked = True
        self._dispatcher.reopen()

    def close(self) -> None:
        """Also the forward at hand ends, though an actor that it waits for may be frozen."""
        self._is_gone = True
        self.cut(list(self._dispatcher.links))
        with self._lock:
            self._dispatcher.links.close()

    def cut(self, names: Collection[str]) -> None:
        """Nothing is waited for from these actors. From any thread."""
        self._dispatcher.links.cut(names)


class PinnedModels:
    """Of one router. From any thread."""

    def __init__(self) -> None:
        self._by_name: dict[str, PinnedModel] = {}
        self._changing = threading.Lock()

    @property
    def names(self) -> list[str]:
        return list(self._by_name)

    def all(self) -> list[PinnedModel]:
        return list(self._by_name.values())

    def add(self, model: PinnedModel) -> None:
        """In the place of one of the same name."""
        name = model.pinned.name
        with self._changing:
            self._give_up([name] if name in self._by_name else [])
            self._by_name[name] = model

    def keep(self, names: Collection[str]) -> None:
        """All others are given up."""
        with self._changing:
            self._give_up([name for name in self._by_name if name not in names])

    def forget(self, name: str, created_s: float) -> None:
        """The pin that was made then is given up. It may be gone already, or another may have its name."""
        with self._changing:
            model = self._by_name.get(name)
            if model is not None and model.pinned.created_s == created_s:
                self._give_up([name])

    def _give_up(self, names: Sequence[str]) -> None:
        for name in names:
            self._by_name.pop(name).close()

    def choose(self, choice: VersionChoice, newest: int) -> PinnedModel:
        """`VersionGone`, with what is there, if no pin keeps it. `newest`: the version that is committed now."""
        found = self.all()
        if choice.pin:
            found = [model for model in found if model.pinned.name == choice.pin]
        if choice.pinned is not None:
            found = [model for model in found if model.pinned.version == choice.pinned]
        if not found:
            wanted = f"pin {choice.pin}" if choice.pin else f"version {choice.pinned}"
            raise VersionGone(f"{wanted} is not kept; there are {self._listed(newest)}")
        return found[-1]

    def cut(self, names: Collection[str]) -> None:
        for model in self.all():
            model.cut(names)

    def num_bytes(self) -> int:
        return sum(model.num_bytes for model in self.all())

    def close(self) -> None:
        self.keep(())

    def _listed(self, newest: int) -> str:
        pinned = [f"version {model.pinned.version} (pin {model.pinned.name})" for model in self.all()]
        return ", ".join([*pinned, f"the newest, {newest}"])
