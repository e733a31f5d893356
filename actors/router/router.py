"""A router actor's inside: a trunk, its links, training steps as transactions, and serving from the same weights.

Who does what: `steps` trains, `placing` keeps to the placement in use, `saving` brings state out and in, `expansion`
makes more of the model, `serving` and `pinning` answer requests, `replicas` are the routers that this one leads. They
share a `State`; what concerns several of them is here.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from actors.compress.settings import CompressionSettings
from actors.errors import InvalidInput, PeerLost, StepAborted
from actors.moe.fp8 import Payload
from actors.moe.settings import BalanceSettings, GateSettings
from actors.optim import OptimizerSettings
from actors.peer_snapshots import Keeper
from actors.router.expansion import Expansion
from actors.router.learner import Learner
from actors.router.likeness import facts_of
from actors.router.links import Links
from actors.router.pieces import PIECE_BYTES
from actors.router.pinning import Pinning
from actors.router.placing import Placing, RosterFinder
from actors.router.roster import Peer, Roster
from actors.router.routing import Routing
from actors.router.saving import Saving
from actors.router.state import ServingSettings, State
from actors.router.steps import Steps
from actors.snapshots import SavedState
from actors.transport.contract import Link
from actors.transport.message import Message
from actors.trunk.checkpoint import CheckpointReader
from actors.trunk.model import ModelSource
from actors.values import Course, Grown, Growth, Pinned, Placement, SnapshotTaken, StepReport


class Router:
    """`train_step`, `placing.adopt`, `grow`, `take_snapshot` and `restore` are called by one thread at a time; serving
    calls by any number of others.

    `find_roster` is asked when expert actors are gone, with their names: it gives the roster to go on with, or raises.

    `in_flight`: micro-batches of a step that are computed at once, 1 to 8; see `actors.router.flight`. Each holds its
    activations, so memory for these grows with it.

    It leads the routers that `join` it: they are `Replica`s, whose own `Router` is made without a roster and gets all
    that it is from the leader. Only the leader is asked to train, to change its placement or to save.
    """

    def __init__(
        self,
        source: ModelSource,
        roster: Roster | None,
        *,
        gate: GateSettings | None = None,
        device: str = "cpu",
        timeout_s: float = 30.0,
        max_step_retries: int = 3,
        max_sessions: int = 16,
        decode_batch: int = 0,
        captured: str = "auto",
        find_roster: RosterFinder | None = None,
        piece_bytes: int = PIECE_BYTES,
        payload: Payload = "trunk",
        in_flight: int = 1,
        prompt_chunk: int | None = None,
    ) -> None:
        self.learner = Learner(source, gate or GateSettings(), device, piece_bytes)
        num_experts = self.learner.skeleton.num_experts
        if roster is not None and roster.placement.num_experts != num_experts:
            raise InvalidInput(
                f"the model has {num_experts} experts a layer", field="placement", value=roster.placement.num_experts
            )
        serving = ServingSettings(max_sessions, decode_batch, captured, prompt_chunk)
        state = State(self.learner, timeout_s=timeout_s, payload=payload, piece_bytes=piece_bytes, serving=serving)
        self.state, self.serving, self.replicas = state, state.serving, state.replicas
        self.placing = Placing(state, find_roster)
        self.steps = Steps(state, self.placing, in_flight=in_flight, max_retries=max_step_retries)
        self.saving = Saving(state, self.placing)
        self.expansion = Expansion(state)
        self.pinning = Pinning(self.learner, state.training, self.replicas, self.serving.pins, timeout_s)
        self.keeper = Keeper()
        if roster is not None:
            self.placing.begin(roster)

    @property
    def routing(self) -> Routing:
        return self.learner.routing

    @property
    def version(self) -> int:
        """Of the trunk."""
        return self.state.version

    @property
    def course(self) -> Course:
        return self.state.course

    @property
    def placement(self) -> Placement:
        """In use."""
        return self.placing.roster.placement

    @property
    def peers(self) -> Mapping[str, Peer]:
        """Of the placement in use."""
        return self.placing.roster.peers

    @property
    def grown_to(self) -> int | None:
        """Experts of every layer, if they are not as many as the model's config says."""
        return self.learner.source.num_experts

    def close(self) -> None:
        self.state.training.links.close()
        self.steps.accumulation.close()
        self.serving.close()
        self.replicas.close()

    # -- training -----------------------------------------------------------------------------------------------------

    def begin_run(
        self,
        settings: OptimizerSettings,
        balance: BalanceSettings | None = None,
        compression: CompressionSettings | None = None,
    ) -> Course:
        """A new job: balance rules, optimizer settings and fresh moments, here and on every expert actor; and how the
        trunk's gradients travel between routers."""
        self._require_one_model()
        state = self.state
        self.learner.follow_rules(balance or BalanceSettings(), compression or CompressionSettings())
        self.placing.reach_all()
        state.run += 1
        fields = {"optimizer": settings.to_dict(), "run": state.run}
        state.training.links.ask_all("begin_run", fields)
        self.replicas.ask("begin_run", {**fields, **self.learner.rules()})
        self.learner.begin_run(settings)
        return self.course

    def continue_run(self, balance: BalanceSettings, compression: CompressionSettings | None = None) -> Course:
        """A job that goes on from a checkpoint: its balance rules, and how gradients travel. Its optimizer settings and
        moments are here."""
        self.learner.follow_rules(balance, compression or CompressionSettings())
        self.replicas.ask("continue_run", self.learner.rules())
        return self.course

    def train_step(
        self, microbatches: Sequence[Tensor], *, lr: float, clip_norm: float, bias_speed: float = 0.0
    ) -> StepReport:
        """One transaction over all micro-batches, each [B, S] token ids. `bias_speed`: gamma of S13 after this step.

        A fault before the commit aborts the attempt everywhere and the same batch runs again, `max_step_retries` times.
        Raises `NonFinite` (nothing was changed), or the last fault when the retries are used up.
        """
        self._require_one_model()
        for ids_BS in microbatches:
            self.serving.check_ids(ids_BS)
        if not microbatches:
            raise InvalidInput("no token to train on", field="microbatches", value=0)
        return self.steps.train(microbatches, lr, clip_norm, bias_speed)

    def cut(self, names: Sequence[str]) -> None:
        """Every wait for these actors ends now, as if their connections had ended. From any thread."""
        self.replicas.cut(names)
        self.serving.pins.cut(names)
        for dispatcher in self.state.dispatchers:
            dispatcher.links.cut(names)

    # -- growth: between two steps ------------------------------------------------------------------------------------

    def prepare_growth(self, growth: Growth) -> None:
        """What needs no weights, so that steps wait less for `grow`. From any thread. Errors as there."""
        self.expansion.prepare(growth, self.placement)

    def grow(self, growth: Growth) -> Grown:
        """More experts from the next step on: on every actor and here, or after an error nowhere.

        `InvalidInput` if the model or its gate cannot have them.
        """
        self._require_one_model()
        started = time.monotonic()
        self.expansion.prepare(growth, self.placement)
        self.placing.confirm()
        made = self.expansion.make(growth, self.placement, self.steps.sample)
        roster = Roster(made.births.placed(self.placement), self.peers)
        with self.replicas.holding():
            with self.placing.or_back(), self.serving.stopped():
                self.placing.place(roster, made.births.fields())
                self.learner.grow(made)
            self.saving.give(self.replicas.names)
        waited = time.monotonic() - started
        self.state.training.links.tell_living("retire", {})
        return Grown(roster.placement, self.learner.skeleton.num_parameters, made.way, made.moved_share, waited)

    # -- pins: between two steps --------------------------------------------------------------------------------------

    def pin(self, name: str, ttl_s: float = 0.0) -> Pinned:
        """The newest version stays available to requests under this name (empty: `v` and the version), and keeps its
        outputs, until `keep_pins` leaves it out. It replaces a pin of the same name. `InvalidInput` where expert actors
        cannot keep one. `ttl_s`: only noted, for whoever looks after the cluster; 0: for ever."""
        self._require_one_model()
        self.placing.reach_all()
        return self.pinning.pin(name or f"v{self.version}", self.version, self.peers, ttl_s)

    def keep_pins(self, names: Collection[str]) -> None:
        """These and no others. It may be repeated after an error."""
        self.placing.reach_all()
        self.pinning.keep(names)

    # -- state in and out: between two steps --------------------------------------------------------------------------

    def take_snapshot(self, *, for_peers: bool = False) -> SnapshotTaken:
        """Copies of all state here and on every owner of a group, at one version; steps wait for the copying alone.

        Each is kept where it was made, until it is written or the next is taken. `for_peers`: as one that is kept in
        memory, beside the one for a checkpoint.
        """
        self._require_one_model()
        self.placing.reach_all()
        return self.saving.take_snapshot(for_peers=for_peers)

    def restore(self, roster: Roster, saved: SavedState[str], run: int) -> None:
        """Back to what was saved, under a placement whose actors have been restored to the same version.

        The number of experts may be another: that of before or after a growth. All that was on its way is given up.
        Serving waits for the switch. After an error it can be called again.
        """
        with self.replicas.holding():
            self.saving.restore(roster, saved, run)
            self.saving.give(self.replicas.names)

    def replace_weights(self, path: str) -> None:
        """Trunk and experts from another directory of the same architecture; optimizer moments start anew.

        After an error, or when this router dies, the weights may be of both. Requests wait then, here and at the other
        routers, until it is called again at whichever leads, or `restore`; steps, snapshots and the like are refused.
        """
        reader = CheckpointReader(path, self.learner.skeleton)
        self.placing.reach_all()
        names = self.replicas.names
        with self.replicas.holding():
            if gone := set(names) - set(self.replicas.names):
                raise PeerLost("it may go on answering with the trunk that it has", peer=", ".join(sorted(gone)))
            self.saving.load(path, reader)
            self.saving.give(self.replicas.names)

    def export(self, directory: Path) -> list[str]:
        """Writes the whole model as a Hugging Face directory. Steps wait meanwhile. Returns the file names."""
        self._require_one_model()
        with self.quiet() as links:
            return self.saving.export(directory, links)

    def _require_one_model(self) -> None:
        if self.serving.is_shut:
            raise StepAborted("an import was cut off, and the weights are of two models; it is to be repeated")

    # -- as the leader of others, and led by one ----------------------------------------------------------------------

    def join(self, name: str, link: Link) -> None:
        """Another router, which has just been started, computes its part of every step from now on. Between two steps,
        which wait until it has taken the trunk over from here. `PeerLost` if it does not. `InvalidInput` if its config
        is another, by the first value that differs."""
        facts = facts_of(self.learner.source, self.learner.gate)
        link.call(Message("compare", {"term": self.replicas.term, "facts": facts}), self.state.timeout_s)
        self.placing.reach_all()
        self.replicas.add(name, link)
        self.saving.give([name])
        if name not in self.replicas.names:
            raise PeerLost("it did not take over the trunk", peer=name)
        self.pinning.give(name)

    def part(self, name: str) -> None:
        """A replica is ended on purpose; between two steps."""
        self.replicas.remove(name)

    def follow_run(
        self, run: int, settings: OptimizerSettings, balance: BalanceSettings, compression: CompressionSettings
    ) -> None:
        """A replica's `begin_run`."""
        self.learner.follow_rules(balance, compression)
        self.state.run = run
        self.learner.begin_run(settings)

    # -- looked at ----------------------------------------------------------------------------------------------------

    @contextmanager
    def quiet(self) -> Iterator[Links]:
        """No update and no other serving forward inside: for exports, imports and status over the serving links."""
        with self.serving.reading():
            yield self.state.requests.links

    def status(self) -> list[dict[str, Any]]:
        """What each expert actor says of itself, in actor order, with the kind of its link."""
        with self.quiet() as links:
            return [{**answer.fields, "link": links[name].kind} for name, answer in links.ask_all("status", {}).items()]

    def vitals(self) -> dict[str, Any]:
        """Cheap, without asking anybody: version, memory in bytes, link kind of each expert actor."""
        num_waiting, queue_s = self.serving.queue()
        return {
            "num_waiting": num_waiting,
            "queue_s": queue_s,
            "version": self.version,
            "run": self.state.run,
            "memory_bytes": self.learner.memory_bytes + self.keeper.num_bytes(),
            "pinned_bytes": self.serving.pins.num_bytes(),
            "pins": [model.pinned for model in self.serving.pins.all()],
            "links": self.state.training.links.kinds(),
            "left_out": self.replicas.lost,
        }
