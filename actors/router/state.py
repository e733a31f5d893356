"""What a router is at a moment, and what it works with: trunk, links, serving, and the routers that follow it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from actors.errors import PeerLost
from actors.moe.fp8 import Payload
from actors.router.commits import LastCommit
from actors.router.dispatcher import Dispatcher
from actors.router.learner import Learner
from actors.router.replicas import Replicas
from actors.router.serving import Serving
from actors.trunk.model import connect
from actors.values import Course


@dataclass(frozen=True)
class ServingSettings:
    """As of `Serving`."""

    max_sessions: int
    decode_batch: int
    capture: str
    prompt_chunk: int | None = None


class State:
    """What the parts of a `Router` share."""

    def __init__(
        self, learner: Learner, *, timeout_s: float, payload: Payload, piece_bytes: int, serving: ServingSettings
    ) -> None:
        self.learner = learner
        self.timeout_s = timeout_s
        self.version = 0
        """Of the trunk: the last step that was committed."""
        self.run = 0
        """Number of the job at hand."""
        self.attempt = 0
        """At the next step: how many have failed."""
        num_layers, num_experts = len(learner.skeleton.layers), learner.skeleton.num_experts
        self.training = Dispatcher(num_layers, num_experts, timeout_s=timeout_s, payload=payload)
        self.requests = Dispatcher(num_layers, num_experts, timeout_s=timeout_s, reroutes=True, payload=payload)
        self.last_commit = LastCommit(self.training.links, self.reopen, timeout_s)
        self.serving = Serving(
            learner,
            self.requests,
            self.last_commit,
            lambda: self.version,
            max_sessions=serving.max_sessions,
            decode_batch=serving.decode_batch,
            capture=serving.capture,
            prompt_chunk=serving.prompt_chunk,
        )
        self.replicas = Replicas(timeout_s, piece_bytes)
        self.replicas.on_experts_lost = self.training.links.close_some
        learner.on_new_model = self.connect
        self.connect()

    @property
    def course(self) -> Course:
        return Course(self.run, self.version)

    @property
    def dispatchers(self) -> tuple[Dispatcher, Dispatcher]:
        return self.training, self.requests

    def attempt_at_next(self) -> dict[str, Any]:
        """As messages name it."""
        return {"step": self.version + 1, "attempt": self.attempt}

    def connect(self) -> None:
        """Trunk and view to the experts."""
        learner = self.learner
        layers = range(len(learner.skeleton.layers))
        connect(learner.trunk, [learner.routing.layer_function(i, self.training) for i in layers])
        connect(learner.view, [learner.routing.layer_function(i, self.requests) for i in layers])

    def reopen(self) -> None:
        """Every expert actor has an open training link. `PeerLost` if one is gone."""
        if gone := self.training.reopen():
            raise PeerLost("the actor is gone", peer=gone[0])

    def disconnect(self) -> None:
        """Questions of before must not be answered now."""
        for dispatcher in self.dispatchers:
            dispatcher.links.connect({})
        self.last_commit.forget()
