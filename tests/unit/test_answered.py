"""Whoever serves a link lives on, whatever one message does."""

from __future__ import annotations

from actors.errors import LinkError
from actors.expert.exchange import Exchange
from actors.transport.message import Message


def unreachable(name: str, address: object) -> None:
    raise LinkError("nobody is asked here", peer=name)


def test_an_exchange_answers_what_it_cannot_read_and_goes_on() -> None:
    exchange = Exchange("expert-0", unreachable, timeout_s=1.0)
    broken = exchange.handle("expert-1", Message("partial", {}))
    assert (broken.op, broken.fields["kind"]) == ("error", "internal")
    unknown = exchange.handle("expert-1", Message("nonsense", {}))
    assert (unknown.op, unknown.fields["kind"]) == ("error", "invalid_input")
