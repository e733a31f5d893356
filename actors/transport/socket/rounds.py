"""A thread that serves an inbox, round after round."""

from __future__ import annotations

import abc
import logging
import threading

from actors.transport.socket.inbox import Inbox
from actors.values import Address

logger = logging.getLogger(__name__)

AFTER_ERROR_S = 0.1
"""Until it goes on, so that an error that comes again and again does not fill the log."""


class Rounds(abc.ABC):
    """Whatever one message does, those after it are served. `start` makes it listen at `address`."""

    def __init__(self, name: str, thread: str, inbox: Inbox) -> None:
        """`thread`: what it is called, before the name."""
        self.name = name
        self.address: Address = inbox.address
        self._inbox = inbox
        self._stop = threading.Event()
        self._closing = threading.Lock()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name=f"{thread}-{name}", daemon=True)

    @abc.abstractmethod
    def _round(self) -> None:
        """Waits for a tenth of a second at most."""

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Any thread may, more than once and at the same time: each returns when it has stopped."""
        self._stop.set()
        with self._closing:
            if self._is_closed:
                return
            self._is_closed = True
            if self._thread.is_alive():
                self._thread.join(timeout_s)
            self._release()
            self._inbox.close()

    def _release(self) -> None:
        """What is to be closed before the inbox."""

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._round()
            except Exception:
                logger.exception("%s goes on after an error", self._thread.name)
                self._stop.wait(AFTER_ERROR_S)
