"""A lock that is handed on in the order of asking."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from actors.fairlock import FairLock

WAIT_S = 10.0


def until(what: int, lock: FairLock) -> None:
    deadline = time.monotonic() + WAIT_S
    while lock.num_waiting < what:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_who_has_waited_longest_comes_next_and_who_comes_back_comes_last() -> None:
    lock, order, all_wait = FairLock(), [], threading.Event()

    def use(name: int, times: int = 1) -> None:
        for _ in range(times):
            with lock:
                order.append(name)
                if name == 0 and len(order) == 1:
                    assert all_wait.wait(WAIT_S)

    threads = [threading.Thread(target=use, args=(0, 2), daemon=True)]
    threads[0].start()
    while not order:
        time.sleep(0.001)
    for name in (1, 2, 3):
        threads.append(threading.Thread(target=use, args=(name,), daemon=True))
        threads[-1].start()
        until(name, lock)
    all_wait.set()
    for thread in threads:
        thread.join(WAIT_S)
    assert order == [0, 1, 2, 3, 0]


def test_it_is_free_again_after_an_error() -> None:
    lock = FairLock()
    try:
        with lock:
            raise ValueError
    except ValueError:
        pass
    with lock:
        assert lock.num_waiting == 0


def test_who_gives_up_waiting_is_passed_over() -> None:
    lock, order = FairLock(), []
    assert lock.acquire()
    assert not lock.acquire(timeout_s=0), "who does not wait does not queue either"
    assert lock.num_waiting == 0

    def use() -> None:
        with lock:
            order.append(1)

    with ThreadPoolExecutor(2) as pool:
        impatient = pool.submit(lock.acquire, 2.0)
        until(1, lock)
        patient = pool.submit(use)
        until(2, lock)
        assert impatient.result(WAIT_S) is False
        assert lock.num_waiting == 1
        assert not order
        lock.release()
        patient.result(WAIT_S)
    assert order == [1]
    assert lock.acquire(timeout_s=0), "it is free again"


def test_what_is_handed_over_as_the_time_ends_is_not_lost() -> None:
    class Late(FairLock):
        """Its holder lets go when whoever waits has just stopped to."""

        def _leave(self, mine: threading.Lock) -> bool:
            self.release()
            return super()._leave(mine)

    late = Late()
    late.acquire()
    assert late.acquire(timeout_s=0.01)
    assert not late.acquire(timeout_s=0), "it has a holder"
