"""What crossed the links of one actor, by kind of link: counters that only rise, also when links are opened anew."""

from __future__ import annotations

import threading
from dataclasses import astuple

from actors.transport.contract import Link, Traffic


class Meter:
    """Thread-safe. Links count from `watch` on, with what they did before, and after they are closed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: list[Link] = []
        self._closed: dict[str, Traffic] = {}

    def watch(self, link: Link) -> Link:
        """-> the same link."""
        with self._lock:
            for other in [other for other in self._open if other.closed]:
                self._open.remove(other)
                self._closed[other.kind] = _sum(self._closed.get(other.kind, Traffic()), other.traffic)
            self._open.append(link)
        return link

    def totals(self) -> dict[str, Traffic]:
        """By kind of link."""
        with self._lock:
            totals = dict(self._closed)
            for link in self._open:
                totals[link.kind] = _sum(totals.get(link.kind, Traffic()), link.traffic)
        return totals


def _sum(a: Traffic, b: Traffic) -> Traffic:
    return Traffic(*(x + y for x, y in zip(astuple(a), astuple(b), strict=True)))
