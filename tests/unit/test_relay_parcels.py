"""What crosses to a node together: its tokens once, taken apart and put together again as each actor alone would have
it; and which way a share takes. No sockets."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch

from actors.errors import (
    InvalidInput,
    LinkError,
    LinkTimeout,
    MoeClusterError,
    PeerLost,
    ProtocolError,
    RemoteError,
    StepAborted,
    VersionGone,
)
from actors.moe.dispatch import HolderTable, Share, plan
from actors.moe.fp8 import pack
from actors.relay.bundle import Bundle, Member, failed, named, raise_if_failed, taken
from actors.router.links import Links
from actors.router.parcels import Parcel, alone, joined
from actors.router.relays import RelayedPending, Relays
from actors.router.roster import Peer, Relaying
from actors.transport.contract import Link
from actors.transport.message import Message, encode
from actors.values import Address

WIDTH = 6
HELD = [[0, 1], [2, 3], [4, 5]]
NAMES = ("a", "b", "c")
ADDRESS = Address("host", "ipc://x", "tcp://y")
MEMBERS = [Member(name, ADDRESS) for name in NAMES]


def shares_of(num_tokens: int, top_k: int = 2) -> tuple[torch.Tensor, list[Share]]:
    generator = torch.Generator().manual_seed(num_tokens)
    ids_TK = torch.stack([torch.randperm(6, generator=generator)[:top_k] for _ in range(num_tokens)])
    return ids_TK, plan(ids_TK, HolderTable.of(HELD, 6))


@pytest.mark.parametrize("num_tokens", [1, 2, 9, 40])
def test_each_token_crosses_once(num_tokens: int) -> None:
    _, shares = shares_of(num_tokens)
    parcel = joined(NAMES, shares)
    tokens = parcel.tokens_T.tolist()
    assert tokens == sorted({t for share in shares for t in share.tokens_T.tolist()})
    for share, row_R in zip(shares, parcel.row_M, strict=True):
        assert row_R.dtype == torch.int32
        assert [tokens[row] for row in row_R.tolist()] == share.tokens_T.tolist()
    assert parcel.num_saved == sum(len(share.tokens_T) for share in shares) - len(tokens)


@pytest.mark.parametrize("payload", ["trunk", "fp8"])
@pytest.mark.parametrize("num_tokens", [1, 2, 9, 40])
def test_every_actor_is_asked_what_it_would_be_asked_alone(num_tokens: int, payload: str) -> None:
    ids_TK, shares = shares_of(num_tokens)
    x_TD, weights_N = torch.randn(num_tokens, WIDTH), torch.rand(ids_TK.numel())
    together = joined(NAMES[: len(shares)], shares).forward({"layer": 3}, x_TD, weights_N, payload)  # type: ignore[arg-type]
    bundle = Bundle.of(named(together, MEMBERS[: len(shares)]))
    for share, question in zip(shares, bundle.questions, strict=True):
        direct = alone("a", share).forward({"layer": 3}, x_TD, weights_N, payload)  # type: ignore[arg-type]
        assert (question.op, dict(question.fields)) == (direct.op, dict(direct.fields))
        for ours, theirs in zip(question.tensors, direct.tensors, strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours.float(), theirs.float())


def test_gradients_come_back_summed_and_those_of_weights_one_by_one() -> None:
    _, shares = shares_of(9)
    parcel, grad_y_TD = joined(NAMES, shares), torch.randn(9, WIDTH, dtype=torch.float64)
    bundle = Bundle.of(named(parcel.backward({"layer": 1}, grad_y_TD), MEMBERS))
    answers = []
    for number, (share, question) in enumerate(zip(shares, bundle.questions, strict=True)):
        assert torch.equal(question.tensors[0], grad_y_TD[share.tokens_T])
        weights_P = torch.full((len(share.pair_P),), float(number))
        answers.append(Message("ok", {}, (question.tensors[0] * (number + 1), weights_P)))
    grad_x_UD, grad_P = bundle.gathered(answers).tensors
    expected_TD = torch.zeros_like(grad_y_TD)
    for number, share in enumerate(shares):
        expected_TD[share.tokens_T] += grad_y_TD[share.tokens_T] * (number + 1)
    torch.testing.assert_close(grad_x_UD, expected_TD[parcel.tokens_T], rtol=1e-14, atol=0)
    assert grad_P.tolist() == [float(n) for n, share in enumerate(shares) for _ in range(len(share.pair_P))]


def test_rows_that_are_all_are_not_copied() -> None:
    rows = torch.randn(4, WIDTH)
    assert taken(rows, torch.arange(4, dtype=torch.int32)) is rows
    assert torch.equal(taken(rows, torch.tensor([2, 0, 1, 3], dtype=torch.int32)), rows[[2, 0, 1, 3]])
    packed, _ = pack(rows)
    assert torch.equal(taken(packed, torch.tensor([1], dtype=torch.int32)).float(), packed.float()[1:2])


@pytest.mark.parametrize(
    "error",
    [
        PeerLost("gone", peer="b"),
        LinkTimeout("late", peer="b"),
        ProtocolError("odd", peer="b"),
        RemoteError("internal: ZeroDivisionError in the actor", peer="b"),
        StepAborted("of another epoch (said b)"),
        VersionGone("not here (said b)"),
        InvalidInput("layer: must be 0 to 1 (said b)"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_is_that_of_the_actors_own_link(error: MoeClusterError) -> None:
    with pytest.raises(type(error)) as caught:
        raise_if_failed(failed("b", error))
    assert str(caught.value) == str(error)
    if isinstance(error, LinkError):
        assert getattr(caught.value, "peer", "") == "b"


# -- which way ---------------------------------------------------------------------------------------------------------


NODE_OF = {"a": "far", "b": "far", "c": "away"}


class Node:
    """Two nodes: `a` and `b` on one, `c` on another, with relays whose links are told here."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.links: dict[str, FakeLink] = {}
        self.dead: set[str] = set()
        self.frozen: dict[str, threading.Event] = {}

    def peers(self, *names: str, worth_bytes: int = 0, node_of: Mapping[str, str] = NODE_OF) -> dict[str, Peer]:
        relaying = {name: Relaying(node_of[name], ADDRESS, self._opener(name), worth_bytes) for name in names}
        return {name: Peer(lambda name=name: FakeLink(name), relaying=relaying[name]) for name in names}  # type: ignore[misc]

    def _opener(self, name: str) -> Callable[[], Link]:
        def open_link() -> Link:
            self.opened.append(name)
            if name in self.frozen:
                assert self.frozen[name].wait(20)
            if name in self.dead:
                raise PeerLost("dead", peer=name)
            self.links[name] = FakeLink(name)
            return self.links[name]

        return open_link


class FakeLink(Link):
    def __init__(self, peer: str) -> None:
        super().__init__(peer)
        self.sent: list[Message] = []
        self.answers: list[Message] = []
        self.is_dead = False

    def _send(self, question: Message) -> None:
        if self.is_dead:
            raise PeerLost("dead", peer=self.peer)
        self.sent.append(question)

    def _receive(self, deadline: float) -> Message:
        if self.closed or self.is_cut or self.is_dead:
            raise PeerLost("the link is closed", peer=self.peer)
        if not self.answers:
            raise LinkTimeout("no answer before the deadline", peer=self.peer)
        return replace(self.answers.pop(0), id=self.sent[-1].id)


@pytest.fixture
def node() -> Node:
    return Node()


def ways(relays: Relays, shares: list[Share], **changes: object) -> list[tuple[str, ...]]:
    asked = {"row_bytes": 8, "lost": (), "may_relay": lambda name: True, **changes}
    return [parcel.names for parcel in relays.parcels(NAMES, shares, **asked)]  # type: ignore[arg-type]


def test_actors_of_a_node_are_asked_together(node: Node) -> None:
    _, shares = shares_of(9)
    relays = Relays()
    assert ways(relays, shares) == [("a",), ("b",), ("c",)], "as long as nobody has a relay"
    relays.connect(node.peers("a", "b", "c"))
    assert ways(relays, shares) == ways(relays, shares) == [("a", "b"), ("c",)]
    assert node.opened == ["a"], "one link, and none to a node with one actor"
    assert relays.ways() == {"a": "a", "b": "a"}
    assert ways(relays, shares, may_relay=lambda name: name != "b") == [("a",), ("b",), ("c",)]
    assert ways(relays, shares[1:]) == [("b",), ("c",)]


def test_too_little_saved_is_not_worth_it(node: Node) -> None:
    _, shares = shares_of(9)
    relays = Relays()
    num_saved = joined(NAMES[:2], shares[:2]).num_saved
    assert num_saved
    relays.connect(node.peers("a", "b", worth_bytes=8 * num_saved))
    assert ways(relays, shares[:2], row_bytes=7) == [("a",), ("b",)]
    assert node.opened == []
    assert ways(relays, shares[:2], row_bytes=8) == [("a", "b")]


def test_what_is_too_much_for_one_message_is_sent_to_each(node: Node) -> None:
    _, shares = shares_of(9)
    relays = Relays()
    relays.connect(node.peers("a", "b"))
    assert ways(relays, shares[:2]) == [("a", "b")]
    parcel = joined(NAMES[:2], shares[:2])
    for weights_N in (torch.rand(18), torch.rand(18, dtype=torch.float64)):
        question = named(parcel.forward({"layer": 3}, torch.randn(9, 2), weights_N, "trunk"), MEMBERS[:2])
        assert sum(map(len, encode(question))) <= parcel.num_bytes(row_bytes=8)
    node.links["a"].max_bytes = parcel.num_bytes(row_bytes=8)
    assert ways(relays, shares[:2]) == [("a", "b")]
    node.links["a"].max_bytes -= 1
    assert ways(relays, shares[:2]) == [("a",), ("b",)]


def test_another_relay_serves_where_the_first_is_lost(node: Node) -> None:
    _, shares = shares_of(9)
    relays = Relays()
    relays.connect(node.peers("a", "b", "c", node_of=dict.fromkeys(NAMES, "far")))
    assert ways(relays, shares) == [("a", "b", "c")]
    assert ways(relays, shares, lost={"a"}) == [("a",), ("b", "c")]
    assert node.opened == ["a", "b"]
    assert node.links["a"].closed
    relays.connect(node.peers("b", "c", node_of=dict.fromkeys(NAMES, "far")))
    assert not node.links["b"].closed
    relays.close()
    assert node.links["b"].closed


def test_a_node_whose_relay_failed_is_asked_directly_until_another_placement(node: Node) -> None:
    _, shares = shares_of(9)
    relays = Relays()
    relays.connect(node.peers("a", "b"))
    node.dead.add("a")
    for _ in range(2):
        assert ways(relays, shares[:2]) == [("a",), ("b",)]
    assert node.opened == ["a"]
    assert relays.ways() == {}
    node.dead.clear()
    relays.try_all()
    assert ways(relays, shares[:2]) == [("a", "b")]


@pytest.fixture
def links(node: Node) -> Links:
    links = Links(timeout_s=0.2, reroutes=True)
    links.connect(node.peers("a", "b", "c"))
    return links


def parcel_of(links: Links) -> Parcel:
    _, shares = shares_of(9)
    return links.relays.parcels(NAMES, shares, 8, links.unreachable, lambda name: True)[0]


def asked(links: Links) -> RelayedPending:
    pending = links.start_parcel(parcel_of(links), Message("relay", {"op": "forward"}))
    assert isinstance(pending, RelayedPending)
    return pending


def test_the_question_names_the_actors_and_where_they_are(node: Node, links: Links) -> None:
    pending = asked(links)
    told = [[name, ADDRESS.host_id, ADDRESS.ipc, ADDRESS.tcp] for name in "ab"]
    assert node.links["a"].sent[0].fields == {"op": "forward", "members": told}
    node.links["a"].answers.append(Message("ok", {"answers": [1, 2]}))
    assert links.answers([pending])[0].fields == {"answers": [1, 2]}  # type: ignore[union-attr]
    assert links.lost == frozenset()


@pytest.mark.parametrize("name", ["a", "b"])
def test_nobody_waits_for_an_actor_that_is_cut_off(links: Links, name: str) -> None:
    pending = asked(links)
    links.cut([name])
    assert links.answers([pending], timeout_s=60.0) == [None]
    assert links.lost == {name}


def test_who_was_cut_off_is_asked_over_its_own_link_alone(node: Node, links: Links) -> None:
    parcel_of(links)
    links.cut(["a"])
    assert parcel_of(links).names == ("a",)
    assert node.opened == ["a"]
    assert links.start("a", Message("forward")) is None


def test_nobody_waits_for_the_relay_of_an_actor_that_is_cut_off(node: Node, links: Links) -> None:
    """While its link is being opened, as that of a frozen process is for the whole deadline."""
    frozen, found = node.frozen.setdefault("a", threading.Event()), list[Parcel]()
    asking = threading.Thread(target=lambda: found.append(parcel_of(links)))
    asking.start()
    while not node.opened:
        assert asking.is_alive()
    links.cut(["a"])
    asking.join(10)
    assert [parcel.names for parcel in found] == [("a",)]
    frozen.set()
    until = time.monotonic() + 10
    while "a" not in node.links or not node.links["a"].closed:
        assert time.monotonic() < until, "what came of it after all is closed"


def test_an_actor_that_its_relay_has_lost_is_lost_alone(node: Node, links: Links) -> None:
    pending = asked(links)
    node.links["a"].answers.append(failed("b", PeerLost("gone", peer="b")))
    assert links.answers([pending]) == [None]
    assert links.lost == {"b"}
    assert (links["a"].closed, links["b"].closed, node.links["a"].closed) == (False, True, False)
    assert not parcel_of(links).is_shared, "until another placement begins"


def test_a_relay_that_ends_is_its_actors_end(node: Node) -> None:
    """Its own link is closed too, so that it is looked for."""
    links = Links(timeout_s=0.2, reroutes=False)
    links.connect(node.peers("a", "b", "c"))
    pending = asked(links)
    node.links["a"].is_dead = True
    with pytest.raises(PeerLost) as caught:
        links.answers([pending])
    assert caught.value.peer == "a"
    assert (links["a"].closed, links["b"].closed, node.links["a"].closed) == (True, False, True)


def test_a_relay_that_has_ended_is_its_actors_end(node: Node, links: Links) -> None:
    asked(links)
    node.links["a"].is_dead = True
    parcel = parcel_of(links)
    assert links.start_parcel(parcel, Message("relay", {"op": "forward"})) is None
    assert links.lost == {"a"}
    assert node.links["a"].closed


def test_a_relay_has_a_deadline(links: Links) -> None:
    with pytest.raises(LinkTimeout) as caught:
        links.answers([asked(links)])
    assert caught.value.peer == "a"
    assert links.lost == frozenset()
    assert not parcel_of(links).is_shared


def test_who_does_not_reroute_is_told_who_is_gone(node: Node) -> None:
    links = Links(timeout_s=0.2, reroutes=False)
    links.connect(node.peers("a", "b"))
    pending = asked(links)
    node.links["a"].answers.append(failed("b", PeerLost("gone", peer="b")))
    with pytest.raises(PeerLost) as caught:
        links.answers([pending])
    assert caught.value.peer == "b"
    assert (links["a"].closed, links["b"].closed) == (False, True)
    links.relays.try_all()
    assert links.reopen() == []
    node.links["a"].is_dead = True
    with pytest.raises(PeerLost) as caught:
        links.start_parcel(parcel_of(links), Message("relay", {"op": "forward"}))
    assert caught.value.peer == "a"
