"""Which pins a cluster keeps: as many as may be, until their time is over or what they keep is gone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from actors.errors import LinkTimeout
from actors.values import Pinned
from cluster.errors import AlreadyExists, FailedPrecondition, NotFound, Unavailable
from cluster.fabric import pins as pins_module
from cluster.fabric.pins import TOLD_AFTER_S, Pins


def pinned(name: str, version: int = 3, expires_s: float | None = None) -> Pinned:
    return Pinned(name, version, {"expert-0": (0, 1), "expert-1": (2, 3)}, 4, 1000.0, expires_s)


class Crew:
    """A leader, a replica and two expert actors that each keep half of the experts."""

    def __init__(self) -> None:
        self.leader = "router-0"
        self.version = 3
        self.living = ["expert-0", "expert-1"]
        self.told: tuple[float, tuple[Pinned, ...]] | None = (0.0, ())
        self.kept: list[list[str]] = []
        """As every message to the leader said."""
        self.forgotten: list[tuple[str, str, float]] = []
        """Router, name and time of the pin."""
        self.failure: Exception | None = None

    @property
    def router(self) -> Any:
        return self._handle("router-0")

    def routers(self) -> dict[str, Any]:
        return {name: (None, self._handle(name)) for name in ("router-0", "router-1")}

    def experts(self) -> list[Any]:
        return [(SimpleNamespace(name=name), None) for name in self.living]

    def pins_of(self, router: str) -> tuple[float, tuple[Pinned, ...]] | None:
        return self.told

    def _handle(self, name: str) -> Any:
        def method(function: Any) -> Any:
            return SimpleNamespace(remote=function)

        return SimpleNamespace(
            pin=method(self._pin),
            keep_pins=method(self.kept.append),
            forget_pin=method(lambda pin, created_s: self.forgotten.append((name, pin, created_s))),
        )

    def _pin(self, name: str, ttl_s: float) -> Any:
        return self.failure or pinned(name or f"v{self.version}", self.version, 1000.0 + ttl_s if ttl_s else None)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Any:
    def call(who: str, answer: Any, timeout_s: float) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    clock = SimpleNamespace(s=1000.0)
    monkeypatch.setattr(pins_module, "call", call)
    monkeypatch.setattr(pins_module, "time", SimpleNamespace(time=lambda: clock.s, monotonic=lambda: clock.s))
    return clock


def names(pins: Pins) -> list[str]:
    return [pin.name for pin in pins.all()]


def test_as_many_as_may_be(now: Any) -> None:
    crew = Crew()
    pins = Pins(crew, 2)  # type: ignore[arg-type]
    first = pins.pin("", 0.0, 3, 5.0)
    assert (first.name, first.version, first.expires_s) == ("v3", 3, None)
    assert pins.pin("", 0.0, 3, 5.0) == first, "nothing was committed since"
    prod = pins.pin("prod", 60.0, 3, 5.0)
    assert prod.expires_s == now.s + 60
    with pytest.raises(FailedPrecondition, match=r"router\.max_pins is 2: v3 \(version 3\), prod \(version 3\)"):
        pins.pin("more", 0.0, 3, 5.0)
    crew.version = 4
    with pytest.raises(AlreadyExists, match="prod keeps version 3"):
        pins.pin("prod", 0.0, 4, 5.0)
    pins.unpin("prod", 5.0)
    assert names(pins) == ["v3"]
    assert crew.kept == [["v3"]]
    assert crew.forgotten == [("router-0", "prod", 1000.0), ("router-1", "prod", 1000.0)]
    with pytest.raises(NotFound, match="no pin prod; there are v3"):
        pins.unpin("prod", 5.0)


def test_one_that_was_not_made_in_time_is_not_left_behind(now: Any) -> None:
    crew = Crew()
    crew.failure = LinkTimeout("no answer", peer="router-0")
    pins = Pins(crew, 2)  # type: ignore[arg-type]
    with pytest.raises(LinkTimeout):
        pins.pin("prod", 0.0, 3, 5.0)
    assert names(pins) == []
    assert crew.kept == [[]]


def test_time_passes(now: Any) -> None:
    crew = Crew()
    pins = Pins(crew, 2)  # type: ignore[arg-type]
    pins.pin("short", 60.0, 3, 5.0)
    pins.pin("long", 0.0, 3, 5.0)
    now.s += 59
    pins.look()
    assert names(pins) == ["short", "long"]
    now.s += 1
    pins.look()
    assert names(pins) == ["long"]
    assert crew.kept == [["long"]]


def test_what_is_no_longer_whole_is_given_up(now: Any) -> None:
    crew = Crew()
    pins = Pins(crew, 2)  # type: ignore[arg-type]
    pins.pin("prod", 0.0, 3, 5.0)
    crew.living.append("expert-2")
    pins.look()
    assert names(pins) == ["prod"]
    crew.living.remove("expert-0")
    pins.look()
    assert names(pins) == [], "who came later does not have it"
    assert crew.forgotten[-1] == ("router-1", "prod", 1000.0)


def test_a_router_that_knows_nothing_of_it(now: Any) -> None:
    """The last one that had the trunk has died; what it had told just before the pin was made does not count."""
    crew = Crew()
    pins = Pins(crew, 2)  # type: ignore[arg-type]
    pins.pin("prod", 0.0, 3, 5.0)
    for told_s, known, expected in ((0.5, (), 1), (TOLD_AFTER_S + 1, ("prod",), 1), (TOLD_AFTER_S + 1, (), 0)):
        crew.told = now.s + told_s, tuple(map(pinned, known))
        pins.look()
        assert len(pins.all()) == expected


def test_a_coordinator_that_has_come_back_hears_of_them(now: Any) -> None:
    crew = Crew()
    crew.told = None
    pins = Pins(crew, 1)  # type: ignore[arg-type]
    with pytest.raises(Unavailable):
        pins.pin("test", 0.0, 3, -1.0)
    pins.look()
    crew.told = now.s, (pinned("prod", 2, now.s + 5),)
    pins.look()
    (prod,) = pins.all()
    assert (prod.name, prod.version, prod.expires_s) == ("prod", 2, now.s + 5)
    with pytest.raises(FailedPrecondition, match="prod"):
        pins.pin("test", 0.0, 3, 5.0)
    now.s += 6
    pins.look()
    assert pins.all() == ()
    assert pins.pin("test", 0.0, 3, 5.0).name == "test"
