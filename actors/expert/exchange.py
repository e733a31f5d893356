"""What expert actors send each other: gradients of copies within a step, and groups on their way to another actor.

Served from a thread of its own, beside the host's: two hosts that push to each other while both are busy must not wait
for each other's work. What comes is put into boxes that the host's thread looks into.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

from torch import Tensor

from actors.errors import InvalidInput, LinkError, PeerLost, StepAborted
from actors.peer_snapshots import OPS as KEEPING
from actors.peer_snapshots import Keeper
from actors.transport.contract import Handler, Link, Pending, answered
from actors.transport.message import Message, error_answer
from actors.values import Address

PeerOpener = Callable[[str, Address], Link]
"""Opens a link to the exchange of another expert actor."""

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True, order=True)
class Attempt:
    """One try at one step. A repeated try has a higher number, which tells late messages of the earlier one apart."""

    step: int
    number: int

    @staticmethod
    def of(fields: Mapping[str, Any]) -> Attempt:
        return Attempt(int(fields["step"]), int(fields["attempt"]))


@dataclass(frozen=True)
class Update:
    """What the owner of a group stepped one of its layers with."""

    gradients: Tensors
    lr: float
    scale: float


class Exchange:
    """`handle` is called by the exchange's own thread; the rest by whoever holds the host's lock."""

    def __init__(self, name: str, open_peer: PeerOpener, *, timeout_s: float) -> None:
        self.name = name
        self.on_follow: Handler = lambda peer, question: error_answer(InvalidInput("nothing is here to follow"))
        self.on_update: Callable[[], None] = lambda: None
        self.keeper = Keeper()
        """Of snapshots, this host's own and those of its peers."""
        self._open_peer = open_peer
        self.timeout_s = timeout_s
        self._addresses: dict[str, Address] = {}
        self._links: dict[str, Link] = {}
        self._opened: WeakSet[Link] = WeakSet()
        """For others, as long as they use them."""
        self._cut_off: set[str] = set()
        """Not asked anew: a frozen process still takes connections."""
        self._changed = threading.Condition()
        self._gradients: dict[tuple[str, Attempt, int, int], dict[str, Tensors]] = {}
        """(kind, attempt, group, layer) -> sender -> gradients."""
        self._updates: dict[tuple[int, int], dict[int, Update]] = {}
        """(group, layer) -> version after it -> update."""
        self._expected: set[int] = set()
        """Groups whose updates are wanted. Who owns one sends them until it hears that they are not."""

    def handle(self, peer: str, question: Message) -> Message:
        if question.op in KEEPING:
            return self.keeper.handle(peer, question)
        return answered(self.name, peer, question, lambda: self._handle(peer, question))

    def _handle(self, peer: str, question: Message) -> Message:
        match question.op:
            case "partial" | "sum":
                self._put(question)
            case "follow":
                return self.on_follow(peer, question)
            case "update":
                is_wanted = self._put_update(question)
                self.on_update()
                return Message("ok", {"wanted": is_wanted})
            case _:
                raise InvalidInput("unknown operation", field="op", value=question.op)
        return Message("ok")

    # -- gradients of copies ------------------------------------------------------------------------------------------

    def connect(self, addresses: Mapping[str, Address]) -> None:
        """Where the other holders are now. A link whose peer listens elsewhere is dropped."""
        for name in [n for n in self._links if addresses.get(n) != self._addresses.get(n)]:
            self._links.pop(name).close()
        self._addresses = dict(addresses)

    def open(self, peer: str, address: Address) -> Link:
        """A link of the caller's own, which `cut` ends too."""
        link = self._open_peer(peer, address)
        with self._changed:
            self._opened.add(link)
        self._cut_if_late(link)
        return link

    def cut(self, peers: Iterable[str]) -> None:
        """Every wait for these ends now. From any thread."""
        for peer in peers:
            self._cut_off.add(peer)
            if (link := self._links.get(peer)) is not None:
                link.cut()
            with self._changed:
                opened = list(self._opened)
            for link in opened:
                if link.peer == peer:
                    link.cut()

    def start(self, peer: str, question: Message) -> Pending:
        """`StepAborted` naming the peer if it cannot be reached."""
        try:
            if (link := self._links.get(peer)) is not None and not link.closed:
                try:
                    return link.start(question)
                except PeerLost:  # it has ended since it was used last, which says nothing of the peer
                    link.close()
            if peer in self._cut_off:
                raise PeerLost("it was cut off", peer=peer)
            self._links[peer] = self._open_peer(peer, self._addresses[peer])
            self._cut_if_late(self._links[peer])
            return self._links[peer].start(question)
        except (KeyError, LinkError) as error:
            raise self._lost(peer, error) from error

    def _cut_if_late(self, link: Link) -> None:
        """`cut` may have come while it was being opened."""
        if link.peer in self._cut_off:
            link.cut()

    def settle(self, pending: Iterable[Pending]) -> None:
        """Waits until all of it is in the boxes of the others."""
        deadline = time.monotonic() + self.timeout_s
        for question in pending:
            try:
                question.result(max(0.001, deadline - time.monotonic()))
            except LinkError as error:
                raise self._lost(question.link.peer, error) from error

    def gradients(self, kind: str, attempt: Attempt, group: int, layer: int) -> dict[str, Tensors]:
        """By sender; out of the box."""
        with self._changed:
            return self._gradients.pop((kind, attempt, group, layer), {})

    def forget_gradients(self, up_to: Attempt) -> None:
        with self._changed:
            self._gradients = {key: box for key, box in self._gradients.items() if key[1] > up_to}

    # -- groups on their way ------------------------------------------------------------------------------------------

    def update(self, group: int, layer: int, version: int) -> Update | None:
        """The update of this layer that leads to `version`, if it has come; out of the box."""
        with self._changed:
            box = self._updates.get((group, layer), {})
            for older in [v for v in box if v < version]:
                del box[older]
            return box.pop(version, None)

    def wait_for_update(self, timeout_s: float) -> None:
        with self._changed:
            self._changed.wait(timeout_s)

    def expect_updates(self, group: int) -> None:
        """Until `forget_updates`; before and after it what comes is dropped."""
        with self._changed:
            self._expected.add(group)

    def forget_updates(self, group: int) -> None:
        with self._changed:
            self._expected.discard(group)
            self._updates = {key: box for key, box in self._updates.items() if key[0] != group}

    def close(self) -> None:
        for link in self._links.values():
            link.close()

    # -- inside -------------------------------------------------------------------------------------------------------

    def _put(self, question: Message) -> None:
        fields: Any = question.fields
        key = (question.op, Attempt.of(fields), int(fields["group"]), int(fields["layer"]))
        with self._changed:
            self._gradients.setdefault(key, {})[str(fields["sender"])] = question.tensors

    def _put_update(self, question: Message) -> bool:
        """Whether anybody here follows the group."""
        fields: Any = question.fields
        update = Update(question.tensors, float(fields["lr"]), float(fields["scale"]))
        group, layer = int(fields["group"]), int(fields["layer"])
        with self._changed:
            if group not in self._expected:
                return False
            self._updates.setdefault((group, layer), {})[int(fields["version"])] = update
            self._changed.notify_all()
            return True

    def _lost(self, peer: str, error: Exception) -> StepAborted:
        if (link := self._links.pop(peer, None)) is not None:
            link.close()
        return StepAborted(f"{peer}, which holds a copy, cannot be reached: {error}")
