"""Pins and unpins: between two steps, on every expert actor, the router that leads and its replicas alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor

from actors.errors import MoeClusterError
from actors.router.dispatcher import Dispatcher
from actors.router.learner import Learner
from actors.router.pins import PinnedModel, PinnedModels
from actors.router.replicas import Replicas
from actors.router.roster import Peer
from actors.values import Pinned


class Pinning:
    """`pin`, `keep` and `give` are the leader's, `follow` and `take` a replica's. One thread at a time."""

    def __init__(
        self, learner: Learner, training: Dispatcher, replicas: Replicas, models: PinnedModels, timeout_s: float
    ) -> None:
        self._learner, self._training, self._replicas, self._models = learner, training, replicas, models
        self._timeout_s = timeout_s

    def pin(self, name: str, version: int, peers: Mapping[str, Peer], ttl_s: float) -> Pinned:
        """Keeps `version`, which is the newest, under a name. After an error nobody has it. `ttl_s`: see `Router.pin`.

        `InvalidInput` where expert actors cannot keep one.
        """
        before = [other for other in self._models.names if other != name]
        try:
            answers: dict[str, Any] = {
                actor: answer.fields["experts"]
                for actor, answer in self._training.links.ask_all("pin", {"name": name, "version": version}).items()
            }
            held = {actor: tuple(experts) for actor, experts in answers.items() if experts}
            now = time.time()
            expires_s = now + ttl_s if ttl_s else None
            pinned = Pinned(name, version, held, self._learner.skeleton.num_experts, now, expires_s)
            self.follow(pinned, peers)
        except MoeClusterError:
            with suppress(MoeClusterError):  # who is told of the next pins drops this one then
                self.keep(before)
            raise
        self._replicas.ask("pin", to_fields(pinned))
        return pinned

    def keep(self, names: Collection[str]) -> None:
        """These and no others."""
        self._models.keep(names)
        self._replicas.ask("keep_pins", {"names": list(names)})
        self._training.links.ask_all("keep_pins", {"names": list(names)})

    def follow(self, pinned: Pinned, peers: Mapping[str, Peer]) -> None:
        """Trunk and gates of now are those of the version."""
        self._add(pinned, self._learner.copied(), peers)

    def give(self, replica: str) -> None:
        """All that is pinned, to a router that joins."""
        for model in self._models.all():
            contacts = {name: dict(peer.contact) for name, peer in model.peers.items()}
            tensors = {name: tensor.contiguous() for name, tensor in model.tensors.items()}
            ticket = {"pin": {**to_fields(model.pinned), "contacts": contacts}}
            self._replicas.give_state([replica], tensors, ticket)

    def take(self, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], find_peer: Callable[..., Peer]) -> None:
        """Counterpart of `give`."""
        peers = {name: find_peer(name, contact) for name, contact in fields["contacts"].items()}
        self._add(of_fields(fields), tensors, peers)

    def _add(self, pinned: Pinned, tensors: Mapping[str, Tensor], peers: Mapping[str, Peer]) -> None:
        keeping = {name: peer for name, peer in peers.items() if name in pinned.held}
        payload = self._training.payload
        model = PinnedModel(pinned, self._learner, tensors, keeping, timeout_s=self._timeout_s, payload=payload)
        self._models.add(model)


def to_fields(pinned: Pinned) -> dict[str, Any]:
    """Of the message that tells it."""
    held = {actor: list(experts) for actor, experts in pinned.held.items()}
    names = ("name", "version", "num_experts", "created_s", "expires_s")
    return {"held": held, **{name: getattr(pinned, name) for name in names}}


def of_fields(fields: Mapping[str, Any]) -> Pinned:
    held = {str(actor): tuple(map(int, experts)) for actor, experts in fields["held"].items()}
    name, version, num_experts = str(fields["name"]), int(fields["version"]), int(fields["num_experts"])
    return Pinned(name, version, held, num_experts, float(fields["created_s"]), fields["expires_s"])
