"""The coordinator's journal on disk: read once, then written beside its work whenever there is something new."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from actors.errors import InvalidInput
from cluster.checkpoint.disk import DISK
from cluster.checkpoint.files import open_files
from cluster.control.journal import Journal

logger = logging.getLogger(__name__)

NAME = "journal.json"


def name_for(cluster: str, *, is_passing: bool) -> str:
    """A cluster that is there to measure or to show something must not replace the journal of one that is to stay."""
    return f"journal-{cluster}.json" if is_passing else NAME


LOOK_EVERY_S = 0.25
AFTER_FAILURE_S = 5.0


def read_journal(url: str, name: str = NAME) -> Journal | None:
    """None if there is none, or none that can be read: that is logged, and the file is put aside."""
    files = open_files(url, DISK)
    try:
        data = files.get(name)
        return None if data is None else Journal.from_json(data, f"{files.url}/{name}")
    except InvalidInput as error:
        logger.error("the journal cannot be used, and is put aside: %s", error)
    except OSError as error:
        logger.error("the journal cannot be read: %s", error)
        return None
    try:
        files.put_aside(name)
    except OSError as error:
        logger.warning("it stays where it is: %s", error)
    return None


class Keeper:
    """Writes what `take` gives, when that differs in more than steps from what was written last."""

    def __init__(
        self, url: str, take: Callable[[], Journal], is_worth_it: Callable[[Journal], bool], name: str = NAME
    ) -> None:
        """`is_worth_it`: asked until it says so once; before, nothing is written."""
        self._files = open_files(url, DISK)
        self._take, self._is_worth_it, self._name = take, is_worth_it, name
        self._lock = threading.Lock()
        self._written: Journal | None = None
        self._is_dropped = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def write_now(self) -> None:
        """What was acknowledged must not be forgotten: returns when it is on disk. Storage that fails is logged, and
        the journal is written when it does not any more."""
        try:
            self._write_if_new()
        except OSError as error:
            logger.warning("the journal cannot be written now: %s", error)

    def close(self) -> None:
        """With a last word, for the cluster that starts next; without one where none is to read it."""
        self._stopping.set()
        if self._name == NAME:
            self.write_now()
            return
        with self._lock, suppress(OSError):
            self._is_dropped = True
            self._files.drop(self._name)

    def _run(self) -> None:
        wait_s = LOOK_EVERY_S
        while not self._stopping.wait(wait_s):
            try:
                self._write_if_new()
                wait_s = LOOK_EVERY_S
            except OSError as error:
                wait_s = AFTER_FAILURE_S
                logger.warning("the journal cannot be written now: %s", error)
            except Exception:  # the thread must survive: without it a restart would forget jobs
                logger.exception("the journal's thread stumbled")
                wait_s = AFTER_FAILURE_S

    def _write_if_new(self) -> None:
        with self._lock:
            if self._is_dropped:
                return
            journal = self._take()
            essence = journal.essence
            if essence == self._written or (self._written is None and not self._is_worth_it(journal)):
                return
            started = time.monotonic()
            self._files.put(self._name, journal.to_json())
            self._written = essence
            if (took_s := time.monotonic() - started) > 1.0:
                logger.warning("writing the journal took %.1f s", took_s)
