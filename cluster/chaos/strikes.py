"""Faults carried out on processes of this machine."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress

import psutil

from cluster.backend import ActorStatus


def kill(actors: Sequence[ActorStatus]) -> None:
    """At once and without a word, as a fault of the machine would."""
    for actor in actors:
        with suppress(ProcessLookupError):
            os.kill(actor.pid, signal.SIGKILL)


def raylet_of(actor: ActorStatus) -> psutil.Process | None:
    """The process that stands for the actor's node; None where it is not to be found."""
    with suppress(psutil.Error):
        parent = psutil.Process(actor.pid).parent()
        if parent is not None and "raylet" in parent.name():
            return parent
    return None


class Freezer:
    """Stops processes for a while. psutil keeps to the process: a number that is used again is left alone."""

    def __init__(self) -> None:
        self._frozen: list[tuple[psutil.Process, threading.Timer]] = []

    def freeze(self, actor: ActorStatus, for_s: float) -> None:
        try:
            process = psutil.Process(actor.pid)
            process.suspend()
        except psutil.NoSuchProcess:
            return
        timer = threading.Timer(for_s, _resume, [process])
        timer.daemon = True
        timer.start()
        self._frozen.append((process, timer))

    @property
    def frozen(self) -> set[int]:
        """Ids of the processes that are stopped now."""
        return {process.pid for process, timer in self._frozen if not timer.finished.is_set()}

    def close(self) -> None:
        """Nobody stays frozen."""
        for process, timer in self._frozen:
            timer.cancel()
            _resume(process)
        self._frozen.clear()


def _resume(process: psutil.Process) -> None:
    with suppress(psutil.Error):
        process.resume()
